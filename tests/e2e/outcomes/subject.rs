//! The guest of a column, and one access to bad memory in it.

use super::column::{Column, Flavour};
use super::table::{Act, Place};
use super::{NotRun, Seen};
use aconite_agent::workload::{
    BUS_MCEERR_AO, BUS_MCEERR_AR, Reply, Request, SIGBUS, Signal, Source, pattern,
};
use aconite_tests::machine::PMEM;
use aconite_tests::workload::Workload;
use aconite_tests::{Machine, Run};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;

pub const PAGE: u64 = 4096;
const LARGE: u64 = 2 << 20;
/// Where in its page the bad line is, and a word that is touched there.
const LINE: u64 = 0x240;
/// A good line of the same page.
const GOOD: u64 = 0x400;
/// The instruction `ret`, as a word.
const RET: u64 = 0xc3;
/// The file with DAX, and its size.
pub const FILE: &str = "/mnt/file";
const FILE_LENGTH: u64 = 1 << 20;
/// The file in memory.
const SHARED: &str = "/tmp/shared";
/// Bytes of RAM that a row maps in small pages.
const LENGTH: u64 = 1 << 16;
/// Huge pages that are set aside: one for each row that loses one.
const HUGE_PAGES: u32 = 8;

/// A number in hexadecimal, as the API writes addresses.
pub fn hex(value: &Value) -> u64 {
    let text = value.as_str().unwrap_or_else(|| panic!("{value} is no number in hexadecimal"));
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or_else(|error| panic!("{value}: {error}"))
}

/// Waits for the end of the scrub that a kernel begins with: it would list what is poisoned meanwhile, and nobody would
/// touch it.
pub fn wait_for_scrub(guest: &mut Machine) {
    guest.until_ok("grep -qx \"[0-9]*\" /sys/bus/nd/devices/ndbus0/nfit/scrub", PMEM);
}

/// A memory device of the guest.
pub struct Device {
    /// Its id.
    pub id: &'static str,
    /// Its guest-physical address.
    pub gpa: u64,
    /// The number of its region, which its other names contain.
    pub region: u32,
}

/// A guest that goes through the rows.
pub struct Subject {
    pub column: Column,
    pub guest: Machine,
    pub workload: Workload,
    mapped: Option<(Place, u64)>,
    devices: Vec<Device>,
    /// Pages that rows have used, of any place: none is used twice.
    used: u64,
    /// The last event that was looked at.
    seen: u64,
}

impl Subject {
    /// Boots a guest with a device for each place.
    pub fn boot(column: Column) -> Self {
        let mut run = Run::kernel(column.kernel).size(column.vcpus, "1G").args(column.flavour.options());
        for id in ["block", "dax4k", "dax2m", "fs"] {
            run = run.pmem(&format!("size=128M,id={id}"));
        }
        let mut guest = run.tools(&["dd", "ndctl", "mkfs.ext4"]).shell();
        let devices = ["block", "dax4k", "dax2m", "fs"].map(|id| {
            let gpa = hex(&guest.device(id)["gpa"]);
            let find = format!(
                "cd /sys/bus/nd/devices; for r in region*; do test $(($(cat $r/resource))) = {gpa} && \
                 test -b /dev/pmem${{r#region}} && echo ${{r#region}} && exit 0; done; exit 1"
            );
            let region = guest.until_ok(&find, PMEM).parse().expect("the number of a region");
            Device { id, gpa, region }
        });
        wait_for_scrub(&mut guest);
        let mut subject = Self {
            workload: Workload::start(&mut guest, 0),
            column,
            guest,
            mapped: None,
            devices: devices.into(),
            used: 0,
            seen: 0,
        };
        subject.prepare();
        subject.events();
        subject
    }

    fn prepare(&mut self) {
        for (id, mode) in
            [("dax4k", "devdax -a 4096"), ("dax2m", "devdax -a 2097152"), ("fs", "fsdax -a 4096")]
        {
            let region = self.device(id).region;
            self.guest.ok(&format!("ndctl create-namespace -f -e namespace{region}.0 -m {mode} -M mem"));
        }
        let fs = self.block("fs");
        self.guest.until_ok(&format!("test -b {fs}"), PMEM);
        self.guest.ok(&format!("mkfs.ext4 -q -b 4096 {fs} && mkdir -p /mnt"));
        self.guest.ok(&format!("mount -t ext4 -o dax=always,noinit_itable {fs} /mnt"));
        self.guest.ok(&format!("echo {HUGE_PAGES} > /proc/sys/vm/nr_hugepages"));
        self.guest.ok("echo always > /sys/kernel/mm/transparent_hugepage/enabled");
        // Errors that are only logged are found within a second.
        self.guest.ok("echo 1 > /sys/devices/system/machinecheck/machinecheck0/check_interval");
        let create = Request::Create(FILE.into(), FILE_LENGTH);
        assert_eq!(self.workload.ask(&mut self.guest, &create), Reply::Done);
        super::story::prepare(self);
    }

    /// The device with this id.
    pub fn device(&self, id: &str) -> &Device {
        self.devices.iter().find(|device| device.id == id).expect("a device of the table")
    }

    /// The path of the block device of a memory device.
    pub fn block(&self, id: &str) -> String {
        format!("/dev/pmem{}", self.device(id).region)
    }

    /// The events since this was last asked.
    pub fn events(&mut self) -> Vec<Value> {
        let events = self.guest.events(self.seen);
        self.seen = events.last().and_then(|event| event["seq"].as_u64()).unwrap_or(self.seen);
        events
    }

    /// Memory that the kernel has given up, in kB (HardwareCorrupted of /proc/meminfo).
    pub fn corrupted(&mut self) -> i64 {
        let text = self.guest.ok("sed -n \"s/^HardwareCorrupted: *\\([0-9]*\\) kB/\\1/p\" /proc/meminfo");
        text.parse().unwrap_or_else(|error| panic!("HardwareCorrupted {text:?}: {error}"))
    }

    /// Asks the process.
    pub fn ask(&mut self, request: Request) -> Reply {
        self.workload.ask(&mut self.guest, &request)
    }

    /// What is mapped for a place.
    pub fn source(&self, place: Place) -> Source {
        let dax = |id| Source::File(PathBuf::from(format!("/dev/dax{}.0", self.device(id).region)));
        match place {
            Place::Devdax4k => dax("dax4k"),
            Place::Devdax2m => dax("dax2m"),
            Place::Fsdax => Source::File(FILE.into()),
            Place::Anonymous => Source::Anonymous(LENGTH),
            Place::Transparent => Source::Anonymous(2 * LARGE),
            Place::Shared => Source::File(SHARED.into()),
            Place::Huge => Source::Huge(LARGE),
        }
    }

    /// Maps a place, if it is not mapped yet; its address. RAM is new each time.
    pub fn map(&mut self, place: Place) -> u64 {
        if let Some((mapped, address)) = self.mapped
            && mapped == place
            && !place.is_ram()
        {
            return address;
        }
        if place == Place::Shared {
            self.guest.ok(&format!("rm -f {SHARED}"));
            assert_eq!(self.ask(Request::Create(SHARED.into(), LENGTH)), Reply::Done);
        }
        let source = self.source(place);
        let Reply::At(address) = self.ask(Request::Map(source)) else { panic!("{place:?} cannot be mapped") };
        if place == Place::Transparent {
            self.guest.ok("grep -q \"AnonHugePages: *[1-9]\" /proc/meminfo");
        }
        self.mapped = Some((place, address));
        address
    }

    /// A page that no row has touched, by its offset in a mapping.
    pub fn fresh(&mut self, place: Place) -> u64 {
        match place {
            // One of the two large pages in it is aligned.
            Place::Transparent => return LARGE,
            _ if place.is_ram() => return PAGE,
            _ => {}
        }
        self.used += 1;
        self.used * if place == Place::Devdax2m { LARGE } else { PAGE }
    }

    /// The device and the offset in it of a guest-physical address, as `ctl poison` has them.
    pub fn place_of(&self, gpa: u64) -> (&'static str, u64) {
        let below = self.devices.iter().filter(|device| device.gpa <= gpa).max_by_key(|device| device.gpa);
        below.map_or(("ram", gpa), |device| (device.id, gpa - device.gpa))
    }

    /// Lets the process touch a good line and then a bad line of one page.
    pub fn access(&mut self, place: Place, act: Act) -> Seen {
        if act == Act::Line && self.guest.sh("grep -qw movdir64b /proc/cpuinfo").status != 0 {
            return Err(NotRun("the processor of this host has no MOVDIR64B".into()));
        }
        let mapping = self.map(place);
        let page = self.fresh(place);
        let line = page + LINE;
        let mut prepare = vec![Request::Fill(page, PAGE), Request::Physical(line)];
        if act == Act::Execute {
            prepare.extend([Request::Store(line, RET), Request::Store(page + GOOD, RET)]);
        }
        let replies = self.workload.ask_all(&mut self.guest, &prepare);
        let Reply::At(gpa) = replies[1] else { panic!("where the line is: {replies:?}") };
        let (device, offset) = self.place_of(gpa);
        let corrupted = self.corrupted();
        self.guest.ctl(&["poison", "add", device, &format!("{offset:#x}+64")]);

        let mut requests = act.requests(page, GOOD, false);
        let good = requests.len() - 1;
        requests.extend(act.requests(page, LINE, true));
        let replies = self.workload.ask_all(&mut self.guest, &requests);
        assert!(replies[good].is_good(page + GOOD), "the good line of the page: {}", replies[good]);
        let bad = replies.last().expect("replies").clone();

        let checks = self.checks(act, mapping + line, gpa, &bad);
        let lost = self.corrupted() - corrupted;
        let cleared = self.guest.ctl(&["poison", "clear", device])["cleared"].clone();
        let healed = if cleared.as_array().is_some_and(Vec::is_empty) { "; line good again" } else { "" };
        let plural = if checks == 1 { "" } else { "s" };
        Ok(format!("{}; {checks} machine check{plural}; +{lost} kB{healed}", bad.in_words(mapping, line)))
    }

    /// Compares what the monitor reported with what the process was told; how many machine checks there were.
    fn checks(&mut self, act: Act, address: u64, gpa: u64, reply: &Reply) -> usize {
        let events = self.events();
        let named = |name| events.iter().filter(move |event| event["event"] == name);
        let traps: Vec<&Value> =
            named("poison_trapped").filter(|event| event["decision"] == "machine_check").collect();
        for trap in &traps {
            let at = (hex(&trap["va"]) / 64, hex(&trap["gpa"]) / 64);
            assert_eq!(at, (address / 64, gpa / 64), "the monitor reports the line: {trap}");
            assert_eq!(trap["direction"], act.direction(), "{trap}");
            let delivered = named("mce_delivered")
                .any(|check| hex(&check["address"]) == gpa & !63 && check["vcpu"] == trap["vcpu"]);
            assert!(delivered, "the vCPU that met the line got its machine check: {events:?}");
        }
        if self.column.flavour == Flavour::IntelBroadcast && !traps.is_empty() {
            let told: BTreeSet<u64> =
                named("mce_delivered").filter_map(|check| check["vcpu"].as_u64()).collect();
            assert_eq!(told.len() as u32, self.column.vcpus, "every processor is told: {events:?}");
        }
        if let (Reply::Signal(signal), Some(trap)) = (reply, traps.first()) {
            assert_eq!(hex(&trap["rip"]), signal.rip, "monitor and kernel name one instruction");
            assert_eq!(trap["cpl"], 3, "{trap}");
        }
        traps.len()
    }

    /// Ends the machine in order.
    pub fn finish(self) {
        self.guest.finish("exit 0").assert_ended(0, "power_off");
    }
}

impl Place {
    /// Whether it is in RAM, which rows lose pages of.
    fn is_ram(self) -> bool {
        matches!(self, Self::Anonymous | Self::Transparent | Self::Shared | Self::Huge)
    }
}

impl Act {
    /// What the process does: to the line at `line` of the page, or, if `whole`, to the whole page where the act can.
    fn requests(self, page: u64, line: u64, whole: bool) -> Vec<Request> {
        let at = page + line;
        let (start, length) = if whole { (page, PAGE) } else { (at, 64) };
        match self {
            Self::Load => vec![Request::Load(at)],
            Self::LoadAgain => vec![Request::Load(at); 2],
            Self::Store => vec![Request::Store(at, pattern(at))],
            Self::Add => vec![Request::Add(at, 0)],
            Self::Copy => vec![Request::Copy(start, length)],
            Self::Line => vec![Request::Line(at), Request::Copy(at, 64)],
            Self::Execute => vec![Request::Execute(at)],
            Self::Send => vec![Request::Send(start, length)],
            Self::Receive => vec![Request::Receive(start, length)],
            Self::Futex => vec![Request::Futex(at)],
        }
    }

    /// What the monitor calls the access.
    fn direction(self) -> &'static str {
        match self {
            // What consumes poison in an atomic is its load.
            Self::Load | Self::LoadAgain | Self::Add | Self::Copy | Self::Send | Self::Futex => "read",
            Self::Store | Self::Receive | Self::Line => "write",
            Self::Execute => "fetch",
        }
    }
}

/// Replies in the words of the table.
trait InWords {
    /// Whether a good line gives this.
    fn is_good(&self, offset: u64) -> bool;
    /// The whole of it.
    fn in_words(&self, mapping: u64, offset: u64) -> String;
}

impl InWords for Reply {
    fn is_good(&self, offset: u64) -> bool {
        match self {
            Self::Loaded { word, .. } => *word == pattern(offset),
            Self::Compared { bad, .. } => *bad == 0,
            Self::Done | Self::Called(0.., None) => true,
            Self::Called(result, None) => *result == -EAGAIN,
            _ => false,
        }
    }

    fn in_words(&self, mapping: u64, offset: u64) -> String {
        match self {
            Self::Signal(signal) => signal_in_words(signal, mapping + offset),
            Self::Called(result, signal) => {
                let result = match *result {
                    error if error == -EFAULT => "EFAULT".to_owned(),
                    error if error == -EAGAIN => "EAGAIN".to_owned(),
                    other => other.to_string(),
                };
                signal.map_or(result.clone(), |signal| {
                    format!("{result}, {}", signal_in_words(&signal, mapping + offset))
                })
            }
            _ if self.is_good(offset) && *self != Self::Done => "good".to_owned(),
            other => other.to_string(),
        }
    }
}

const EAGAIN: i64 = 11;
const EFAULT: i64 = 14;

/// A signal in the words of the table: which it is, and what it says of `address`, at which the bad line is.
pub fn signal_in_words(signal: &Signal, address: u64) -> String {
    let kind = match (signal.number, signal.code) {
        (SIGBUS, BUS_MCEERR_AR) => "SIGBUS AR",
        (SIGBUS, BUS_MCEERR_AO) => "SIGBUS AO",
        (number, code) => return format!("signal {number}, code {code}"),
    };
    // Where the kernel says more than the beginning of the area, or something else.
    let precision = match signal.address {
        area if area == address >> signal.lsb << signal.lsb => "",
        page if page == address / PAGE * PAGE => ", to the page",
        byte if byte == address => ", to the byte",
        _ => ", of another place",
    };
    format!("{kind}, lsb {}{precision}", signal.lsb)
}
