//! What happens in the demo, from boot to the end of the guest.

use super::guest::Guest;
use super::program::{Program, number};
use super::report::{Check, Report};
use super::words::{bad_blocks, done, plain, show_stale, word};
use aconite_agent::workload::{Reply, Request, Signal, Source, WORD, pattern_bytes};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The device's id.
const DEVICE: &str = "p0";
/// Where the file system is mounted, and the file on it.
const FILE: &str = "/mnt/data";
/// Bytes of the file.
const FILE_LENGTH: u64 = 1 << 20;
/// Bytes that are poisoned: a cache line.
const LINE: u64 = 64;
/// Bytes of a sector, the unit of the kernel's list of bad blocks.
const SECTOR: u64 = 512;
/// Bytes of a page.
const PAGE: u64 = 4096;
/// Offset of the poisoned line in the file: in the middle of a page, with good lines of its sector on both sides.
const LINE_OFFSET: u64 = 10 * PAGE + 0x240;
/// How long the first-level machine and the guest may take to start.
const BOOT: Duration = Duration::from_secs(240);
/// Seconds that umount(8) may take after the removal.
const UMOUNT: u64 = 10;
/// EIO of errno(3).
const EIO: i32 = 5;

/// Where the files of the demo are, from the top of the tree.
pub struct Place {
    /// The file behind the device.
    pub media: PathBuf,
    /// The API socket.
    pub socket: PathBuf,
    /// The run directory.
    pub run_dir: PathBuf,
    kernel: PathBuf,
}

impl Place {
    /// The files in `directory`, and the kernel of the material.
    pub fn new(directory: &Path, material: &Path) -> Self {
        Place {
            media: directory.join("p0.img"),
            socket: directory.join("vm.sock"),
            run_dir: directory.join("run"),
            kernel: material.join("kernels/6.12/vmlinuz"),
        }
    }
}

/// A run of the demo.
pub struct Story<'a> {
    root: &'a Path,
    place: &'a Place,
    program: &'a Program,
    report: &'a mut Report,
}

/// Where things are.
#[derive(Clone, Copy)]
struct Where {
    /// Guest-physical address of the device.
    gpa: u64,
    /// Address of the mapping.
    mapping: u64,
    /// Offset of the poisoned line in the block device.
    block: u64,
    /// Offset of the poisoned line in the memory device.
    device: u64,
}

impl Where {
    fn line(&self) -> u64 {
        self.mapping + LINE_OFFSET
    }
}

impl<'a> Story<'a> {
    /// A demo with nothing seen yet.
    pub fn new(root: &'a Path, place: &'a Place, program: &'a Program, report: &'a mut Report) -> Self {
        Story { root, place, program, report }
    }

    /// Tells it to its end.
    pub fn tell(mut self) -> Result<()> {
        println!(
            "Step 3: boot a stock kernel with 1 GiB of persistent memory, backed by a file of this host"
        );
        let mut guest = self.boot()?;
        println!("Step 4: make a file system on it, with DAX, and map a file");
        let at = self.map(&mut guest)?;
        println!("Step 5: poison one line of 64 bytes of the mapped file, through the API socket");
        self.poison(at)?;
        println!("Step 6: load the lines around it, then the line itself");
        self.consume(&mut guest, at)?;
        println!("Step 7: read the sector, and ask the kernel what is bad");
        self.read(&mut guest, at)?;
        println!("Step 8: repair it as a user would: write the page, so that Linux clears the line");
        self.repair(&mut guest)?;
        println!("Step 9: pull the memory from under the mounted file system, and touch the old mapping");
        self.remove(&mut guest, at)?;
        println!("Step 10: unmount what is left");
        self.end(guest)
    }

    fn boot(&mut self) -> Result<Guest> {
        let start = Instant::now();
        let media = format!("file={},size=1G,id={DEVICE}", self.place.media.display());
        let text = |path: &'a Path| path.to_str().context("The path of the tree is not UTF-8");
        let kernel = text(&self.place.kernel)?;
        let (socket, run_dir) = (text(&self.place.socket)?, text(&self.place.run_dir)?);
        let arguments = [
            ["run", "-k", kernel].as_slice(),
            &["--pmem", &media, "--tool", "ndctl", "--tool", "mkfs.ext4"],
            &["--api-socket", socket, "--run-dir", run_dir],
        ]
        .concat();
        let mut guest = Guest::start(self.program, &arguments)?;
        // Answered as soon as the guest runs the workload.
        let (reply, output) = guest.ask_within(&Request::Run(30, "uname -r".into()), BOOT)?;
        let time = start.elapsed();
        self.report.took("boot", time);
        let machine = self.program.ctl(&["info"])?;
        let release = output.join(" ");
        let host = match machine["host"].as_str() {
            Some("nested") => "the software KVM host",
            _ => "this host's KVM",
        };
        let booted = reply == Reply::Exit(0) && machine["agent"] == true && !release.is_empty();
        let outcome = if booted {
            Ok(format!("Linux {release} runs in {host}, {:.1} s after the command", time.as_secs_f64()))
        } else {
            Err(format!("the guest answered {reply} {release:?}, the machine says {machine}"))
        };
        self.report.check(Check::Boot, outcome);
        Ok(guest)
    }

    fn map(&mut self, guest: &mut Guest) -> Result<Where> {
        guest.must_run("ndctl create-namespace -f -e namespace0.0 -m fsdax -M mem > /dev/null")?;
        guest.must_run("mkfs.ext4 -q /dev/pmem0")?;
        guest.must_run("mount -t ext4 -o dax=always,noinit_itable /dev/pmem0 /mnt")?;
        let path = || PathBuf::from(FILE);
        match guest.ask(&Request::Create(path(), FILE_LENGTH))? {
            Reply::Done => {}
            reply => bail!("{FILE} could not be written: {reply}"),
        }
        let Reply::At(mapping) = guest.ask(&Request::Map(Source::File(path())))? else {
            bail!("{FILE} cannot be mapped")
        };
        let words = FILE_LENGTH / WORD;
        let outcome = match guest.ask(&Request::Scan(0, FILE_LENGTH))? {
            Reply::Compared { good, bad: 0 } if good == words => {
                Ok(format!("{FILE} is mapped at {mapping:#x}; all its {good} words are as written"))
            }
            reply => Err(format!("not all {words} words of the mapping are as written: {reply}")),
        };
        self.report.check(Check::DaxMapping, outcome);

        let Reply::At(block) = guest.ask(&Request::Locate(path(), LINE_OFFSET))? else {
            bail!("The file system does not say where {FILE} is")
        };
        let start = guest.must_run("cat /sys/block/pmem0/device/resource")?;
        let start = number(&Value::String(start.trim().to_owned()))
            .with_context(|| format!("{start:?} is no address of /dev/pmem0"))?;
        let memory = self.program.ctl(&["memory", DEVICE])?;
        let gpa = number(&memory["gpa"]).context("The machine does not say where the device is")?;
        let device = (start + block).checked_sub(gpa).context("/dev/pmem0 is not in the device")?;
        let at = Where { gpa, mapping, block, device };
        let mut bytes = vec![0; LINE as usize];
        let media = self.root.join(&self.place.media);
        let read = File::open(&media).and_then(|file| file.read_exact_at(&mut bytes, device));
        let outcome = match read {
            Ok(()) if bytes == pattern_bytes(LINE_OFFSET, LINE as usize) => Ok(format!(
                "byte {LINE_OFFSET:#x} of {FILE} is byte {device:#x} of {DEVICE}: its 64 bytes are there in {}",
                self.place.media.display()
            )),
            Ok(()) => Err(format!("{} has other bytes at {device:#x}", media.display())),
            Err(error) => Err(format!("{} cannot be read at {device:#x}: {error}", media.display())),
        };
        self.report.check(Check::Place, outcome);
        Ok(at)
    }

    fn poison(&mut self, at: Where) -> Result<()> {
        let range = format!("{:#x}+{LINE}", at.device);
        self.program.ctl(&["poison", "add", DEVICE, &range])?;
        let list = self.program.ctl(&["poison", "list", DEVICE])?;
        let ranges = list["ranges"].as_array().map(Vec::as_slice).unwrap_or_default();
        let exact = matches!(ranges, [one] if is_range(one, at.device, LINE)) && list["bytes"] == LINE;
        let outcome = if exact {
            Ok(format!("{LINE} bytes at {:#x} of {DEVICE} are bad, and nothing else", at.device))
        } else {
            Err(format!("the poison is not the one line at {:#x}: {list}", at.device))
        };
        self.report.check(Check::OneLine, outcome);
        Ok(())
    }

    fn consume(&mut self, guest: &mut Guest, at: Where) -> Result<()> {
        let page = LINE_OFFSET / PAGE * PAGE;
        let parts = [(page, LINE_OFFSET - page), (LINE_OFFSET + LINE, page + PAGE - LINE_OFFSET - LINE)];
        let mut good_words = 0;
        let mut wrong = None;
        for (offset, length) in parts {
            match guest.ask(&Request::Scan(offset, length))? {
                Reply::Compared { good, bad: 0 } => good_words += good,
                reply => wrong = Some(format!("loading {length:#x} bytes at {offset:#x}: {reply}")),
            }
        }
        let outcome = match wrong {
            None => Ok(format!("the {good_words} words around it in its page are loaded and right")),
            Some(text) => Err(text),
        };
        self.report.check(Check::Neighbours, outcome);

        let before = self.last_event()?;
        let reply = guest.ask(&Request::Load(LINE_OFFSET))?;
        let outcome = match &reply {
            Reply::Signal(signal) if signal.is_poison_at(at.line()) => Ok(format!(
                "loading {:#x} raised SIGBUS: si_code {} (BUS_MCEERR_AR), si_addr {:#x}, si_addr_lsb {}: the line is in \
                 these {} bytes",
                at.line(),
                signal.code,
                signal.address,
                signal.lsb,
                1u64 << signal.lsb.min(63)
            )),
            reply => Err(format!("loading {:#x} did not raise SIGBUS there: {reply}", at.line())),
        };
        self.report.check(Check::Sigbus, outcome);
        let events = self.program.events(before)?;
        self.report.check(Check::Delivered, machine_check(&events, &reply, at));
        Ok(())
    }

    fn read(&mut self, guest: &mut Guest, at: Where) -> Result<()> {
        let sector = LINE_OFFSET / SECTOR * SECTOR;
        let outcome = match guest.ask(&Request::Read(FILE.into(), sector, SECTOR))? {
            Reply::Errno(EIO) => Ok(format!("read(2) of the sector at {sector:#x} of {FILE} fails with EIO")),
            reply => Err(format!("read(2) of the sector at {sector:#x} of {FILE}: {reply}")),
        };
        self.report.check(Check::Eio, outcome);
        let list = guest.must_run("cat /sys/block/pmem0/badblocks")?;
        let expected = (at.block / SECTOR, 1);
        let outcome = if bad_blocks(&list) == [expected] {
            Ok(format!("the kernel lists sector {} of /dev/pmem0 as bad, and no other", expected.0))
        } else {
            Err(format!("the kernel's list is {list:?} instead of sector {}", expected.0))
        };
        self.report.check(Check::BadBlock, outcome);
        Ok(())
    }

    fn repair(&mut self, guest: &mut Guest) -> Result<()> {
        let before = self.last_event()?;
        let page = LINE_OFFSET / PAGE * PAGE;
        let written = guest.ask(&Request::Write(FILE.into(), page, PAGE))?;
        let read = guest.ask(&Request::Read(FILE.into(), page, PAGE))?;
        let loaded = guest.ask(&Request::Scan(page, PAGE))?;
        let whole = Reply::Compared { good: PAGE / WORD, bad: 0 };
        let outcome = if written == Reply::Done && read == whole && loaded == whole {
            Ok(format!(
                "after pwrite(2) of the page at {page:#x} of {FILE}, read(2) and the mapping give its data again"
            ))
        } else {
            Err(format!("pwrite(2): {written}; read(2): {read}; the mapping: {loaded}"))
        };
        self.report.check(Check::RepairedRead, outcome);
        let list = guest.must_run("cat /sys/block/pmem0/badblocks")?;
        let poison = self.program.ctl(&["poison", "list", DEVICE])?;
        let events = self.program.events(before)?;
        let by_guest =
            named(&events, "poison_cleared").any(|event| event["device"] == DEVICE && event["by"] == "guest");
        let outcome =
            if bad_blocks(&list).is_empty() && list.trim().is_empty() && poison["bytes"] == 0 && by_guest {
                Ok("the kernel cleared the line by firmware call; its list and the monitor's are empty"
                    .to_owned())
            } else {
                Err(format!(
                    "the kernel's list: {list:?}; the monitor's: {poison}; cleared by the guest: {by_guest}"
                ))
            };
        self.report.check(Check::NothingBad, outcome);
        Ok(())
    }

    fn remove(&mut self, guest: &mut Guest, at: Where) -> Result<()> {
        // What the old mapping shows before.
        match guest.ask(&Request::Scan(0, FILE_LENGTH))? {
            Reply::Compared { bad: 0, .. } => {}
            reply => bail!("The mapping is not whole before the removal: {reply}"),
        }
        let before = self.last_event()?;
        self.program.ctl(&["remove", DEVICE, "--surprise", "--wait", "60s"])?;
        let patience = "for i in $(seq 300); do [ -e /sys/block/pmem0 ] || exit 0; sleep 0.1; done; exit 1";
        let (let_go, _) = guest.run(60, patience)?;
        let memory = self.program.ctl(&["memory", DEVICE])?;
        let outcome = if memory["state"] == "departed" && let_go == Reply::Exit(0) {
            Ok(format!("{DEVICE} is gone without the guest's consent; its kernel has taken /dev/pmem0 away"))
        } else {
            Err(format!("the machine says {memory}; waiting for /dev/pmem0 to go: {let_go}"))
        };
        self.report.check(Check::SurpriseRemoval, outcome);

        let mut own = Vec::new();
        for offset in [0, LINE_OFFSET, FILE_LENGTH - WORD] {
            let reply = guest.ask(&Request::Load(offset))?;
            self.report.observe(format!(
                "loading {:#x} of the old mapping {}",
                at.mapping + offset,
                word(&reply, offset)
            ));
            if let Reply::Loaded { rip, .. } = reply {
                own.push((at.mapping + offset, rip));
            }
        }
        let reply = guest.ask(&Request::Store(0, 0))?;
        self.report.observe(format!("storing to {:#x} of the old mapping {}", at.mapping, done(&reply)));
        let events = self.program.events(before)?;
        let stale: Vec<Value> = named(&events, "stale_access").cloned().collect();
        show_stale(&stale);
        let matching = own
            .iter()
            .filter(|(va, rip)| {
                stale.iter().any(|event| {
                    number(&event["va"]) == Some(*va)
                        && number(&event["rip"]) == Some(*rip)
                        && number(&event["gpa"]).is_some_and(|gpa| gpa >= at.gpa)
                        && event["cpl"] == 3
                        && event["direction"] == "read"
                })
            })
            .count();
        let total = self.program.ctl(&["memory", DEVICE])?["stale_accesses"].as_u64().unwrap_or(0);
        let outcome = if matching > 0 && matching == own.len() {
            Ok(format!(
                "all {matching} loads of the workload that went through were reported, with its own RIP and address; \
                 {total} stale accesses in all"
            ))
        } else {
            Err(format!(
                "{matching} of the workload's {} loads that went through were reported; {total} stale accesses in all",
                own.len()
            ))
        };
        self.report.check(Check::StaleAccess, outcome);
        self.report.stale(stale);
        Ok(())
    }

    fn end(&mut self, mut guest: Guest) -> Result<()> {
        let unmapped = guest.ask(&Request::Unmap)?;
        self.report.observe(format!("munmap(2) of the old mapping {}", done(&unmapped)));
        let clean = match guest.run(UMOUNT, "umount /mnt") {
            Ok((Reply::Exit(0), _)) => {
                self.report.observe("umount(8) succeeded".into());
                true
            }
            Ok((Reply::Exit(status), _)) if status > 128 => {
                self.report.observe(format!("umount(8) was ended by signal {}", status - 128));
                false
            }
            Ok((Reply::Timeout, _)) => {
                self.report.observe(format!("umount(8) hangs: it was not done in {UMOUNT} s"));
                false
            }
            Ok((reply, _)) => {
                self.report.observe(format!("umount(8) failed: {reply}"));
                false
            }
            Err(error) => {
                self.report.observe(format!("the guest did not survive umount(8): {error:#}"));
                false
            }
        };
        // A damaged kernel may not be able to power off.
        guest.dismiss();
        if !clean && let Err(error) = self.program.ctl(&["quit"]) {
            self.report.observe(format!("the machine does not answer any more: {error:#}"));
        }
        match guest.wait(Duration::from_secs(60)) {
            Some(status) => self.report.observe(format!("aconite ended with {status}")),
            None => bail!("aconite did not end after the demo"),
        }
        Ok(())
    }

    fn last_event(&self) -> Result<u64> {
        let events = self.program.events(0)?;
        Ok(events.last().and_then(|event| event["seq"].as_u64()).unwrap_or(0))
    }
}

fn named<'e>(events: &'e [Value], name: &'e str) -> impl Iterator<Item = &'e Value> {
    events.iter().filter(move |event| event["event"] == name)
}

fn is_range(range: &Value, offset: u64, length: u64) -> bool {
    number(&range["offset"]) == Some(offset) && number(&range["length"]) == Some(length)
}

/// Whether the monitor delivered one machine check, for the load that got `reply`.
fn machine_check(events: &[Value], reply: &Reply, at: Where) -> Result<String, String> {
    let Reply::Signal(Signal { rip, .. }) = reply else { return Err("there was no signal".into()) };
    let trap = named(events, "poison_trapped").find(|event| {
        event["decision"] == "machine_check"
            && number(&event["va"]) == Some(at.line())
            && number(&event["rip"]) == Some(*rip)
    });
    let checks: Vec<&Value> = named(events, "mce_delivered").collect();
    match (checks[..].first(), trap) {
        (Some(check), Some(trap)) if number(&check["address"]) == Some(at.gpa + at.device) => Ok(format!(
            "the monitor stopped vCPU {} at RIP {rip:#x}, the workload's own load, and raised #MC: bank {}, status {}, \
             address {}",
            trap["vcpu"],
            check["bank"],
            plain(&check["status"]),
            plain(&check["address"])
        )),
        (None, _) => Err("the monitor reports no machine check".into()),
        _ => Err(format!("the machine check is not that of the load: {checks:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const AT: Where = Where { gpa: 1 << 32, mapping: 0x7f00_0000_0000, block: 0x8_0240, device: 0x28_0240 };

    #[test]
    fn the_machine_check_is_that_of_the_load() {
        let signal = Signal { number: 7, code: 4, address: 0x7f00_0000_a000, lsb: 12, rip: 0x40_1000 };
        let va = format!("{:#x}", AT.line());
        let events = |rip: &str| {
            vec![
                json!({"event": "poison_trapped", "decision": "machine_check", "va": va, "rip": rip, "vcpu": 0}),
                json!({"event": "mce_delivered", "bank": 1, "status": "0xbc00", "address": "0x100280240"}),
            ]
        };
        let reply = Reply::Signal(signal);
        assert!(machine_check(&events("0x401000"), &reply, AT).is_ok());
        assert!(machine_check(&events("0x401008"), &reply, AT).is_err());
        assert!(machine_check(&events("0x401000")[..1], &reply, AT).is_err());
        assert!(machine_check(&events("0x401000"), &Reply::Done, AT).is_err());
    }
}
