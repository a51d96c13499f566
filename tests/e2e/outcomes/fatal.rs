//! Rows that end their machine: each has a guest of its own.

use super::column::{Column, Flavour};
use super::report::{self, Cell};
use super::subject::{hex, wait_for_scrub};
use super::table::{Difference, Expected};
use super::{Seen, judge};
use aconite_agent::workload::{Reply, Request, Source};
use aconite_tests::machine::PMEM;
use aconite_tests::workload::Workload;
use aconite_tests::{Machine, Run};

use std::panic::{self, AssertUnwindSafe};
use std::thread;
use std::time::{Duration, Instant};

/// How long a kernel may take to panic.
const PANIC: Duration = Duration::from_secs(90);
/// Machine checks for one load that show that nothing but them happens any more.
const MANY: usize = 200;
/// What the shell says when it can.
const SURVIVED: &str = "SURVIVED";
/// What the kernel says when it gives up, and before that of the machine check.
const GIVES_UP: &str = "Kernel panic - not syncing: ";
const SAYS: &str = "Machine check: ";

/// A row.
pub struct Row {
    /// Its name.
    name: &'static str,
    /// The kinds of machine that it is for.
    flavours: &'static [Flavour],
    /// Options of the monitor beside those of the column.
    options: &'static [&'static str],
    /// Processors.
    vcpus: u32,
    /// What is done.
    run: fn(Fatal) -> String,
    /// What comes of it.
    expected: Expected,
}

const AMD: &[Flavour] = &[Flavour::Smca, Flavour::Legacy];
const INTEL: &[Flavour] = &[Flavour::IntelLmce, Flavour::IntelBroadcast];
const ALL: &[Flavour] = &[Flavour::Smca, Flavour::Legacy, Flavour::IntelLmce, Flavour::IntelBroadcast];

const GRADES: &str = "mce_severity()";
const AMD_GRADES: &str = "AMD's grades are mce_severity_amd()'s, with words of their own";
const ALL_TOLD: &str = "do_machine_check() calls what all processors are told of by another name";

const KERNEL_LOAD: Expected =
    Expected::always("panic: Fatal local machine check; Data load in unrecoverable area of kernel").but(&[
        Difference {
            kernels: &[],
            flavours: AMD,
            expected: "panic: Fatal local machine check; Uncorrected unrecoverable error in kernel context",
            function: GRADES,
            reason: AMD_GRADES,
        },
        Difference {
            kernels: &[],
            flavours: &[Flavour::IntelBroadcast],
            expected: "panic: Fatal machine check; Data load in unrecoverable area of kernel",
            function: "mce_reign()",
            reason: ALL_TOLD,
        },
    ]);
const CONTEXT: Expected = Expected::always("panic: Fatal local machine check; Processor context corrupt")
    .but(&[
        Difference {
            kernels: &[],
            flavours: AMD,
            expected: "panic: Fatal local machine check; Processor Context Corrupt",
            function: GRADES,
            reason: AMD_GRADES,
        },
        Difference {
            kernels: &[],
            flavours: &[Flavour::IntelBroadcast],
            expected: "panic: Fatal machine check; Processor context corrupt",
            function: "mce_reign()",
            reason: ALL_TOLD,
        },
    ]);

/// The rows.
const ROWS: &[Row] = &[
    Row {
        name: "plain memcpy",
        flavours: ALL,
        // Without fast strings copy_mc_to_kernel() is memcpy().
        options: &["--cpu", "erms=off"],
        vcpus: 2,
        run: read_of_device,
        expected: KERNEL_LOAD,
    },
    Row {
        name: "plain memcpy, mce=recovery",
        flavours: ALL,
        // copy_mc_to_kernel() is copy_mc_fragile().
        options: &["--cpu", "erms=off", "--append", "mce=recovery"],
        vcpus: 2,
        run: read_of_device,
        expected: Expected::always("EIO"),
    },
    Row {
        name: "load of the kernel's own",
        flavours: ALL,
        options: &[],
        vcpus: 2,
        run: read_of_page_cache,
        expected: KERNEL_LOAD,
    },
    Row {
        name: "context corrupt",
        flavours: ALL,
        options: &[],
        vcpus: 2,
        run: context_corrupt,
        expected: CONTEXT,
    },
    Row {
        name: "no recovery, AMD",
        flavours: AMD,
        options: &["--cpu", "recovery=off"],
        vcpus: 2,
        run: load,
        expected: Expected::always(
            "panic: Fatal local machine check; Uncorrected error without MCA Recovery",
        ),
    },
    Row {
        name: "no recovery, Intel",
        flavours: INTEL,
        options: &["--cpu", "recovery=off"],
        // With more, it may also be that they do not find together in time (mce_timed_out).
        vcpus: 1,
        run: load,
        // A finding: mce_severity_intel() grades the error MCE_UC_SEVERITY ("Uncorrected") without SER_P, for which
        // do_machine_check() does nothing; the load is made again, for ever.
        expected: Expected::always("livelock: the load is made again and again"),
    },
];

/// Runs all rows of a column, and writes down what came of each.
pub fn run_column(column: Column) {
    let mut cells: Vec<Cell> = Vec::new();
    for row in ROWS.iter().filter(|row| row.flavours.contains(&column.flavour)) {
        let result = panic::catch_unwind(AssertUnwindSafe(|| Seen::Ok((row.run)(Fatal::boot(column, row)))));
        let cell = judge(row.name, &row.expected, &column, result);
        eprintln!("{column}: {cell}");
        cells.push(cell);
    }
    report::write(&format!("{}-{}-fatal", column.kernel, column.flavour), cells);
}

/// A guest with a block device.
struct Fatal {
    guest: Machine,
    workload: Workload,
    device: String,
    gpa: u64,
}

impl Fatal {
    fn boot(column: Column, row: &Row) -> Self {
        let run = Run::kernel(column.kernel).size(row.vcpus, "512M").args(column.flavour.options());
        let mut guest = run.args(row.options).pmem("size=128M,id=p0").tools(&["dd"]).shell();
        let device = "/dev/pmem0".to_owned();
        guest.until_ok(&format!("test -b {device}"), PMEM);
        wait_for_scrub(&mut guest);
        let gpa = hex(&guest.device("p0")["gpa"]);
        let workload = Workload::start(&mut guest, 0);
        Self { guest, workload, device, gpa }
    }

    fn machine_checks(&self) -> usize {
        let traps = self.guest.events_named(0, "poison_trapped");
        traps.iter().filter(|event| event["decision"] == "machine_check").count()
    }

    /// Types `script` into the shell, which need not come back, and says what comes of it: `done` if it printed that
    /// in time.
    fn outcome(mut self, script: &str, done: &str) -> String {
        self.guest.type_in(format!("{script}\n").as_bytes());
        let deadline = Instant::now() + PANIC;
        loop {
            if self.guest.stdout().contains(done) {
                return done.to_owned();
            }
            let events = self.guest.events(0);
            if events.iter().any(|event| event["event"] == "guest_panicked") {
                return self.panicked();
            }
            if self.machine_checks() > MANY {
                return "livelock: the load is made again and again".to_owned();
            }
            assert!(Instant::now() < deadline, "nothing comes of {script:?}; {:?}", events.last());
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// The kernel's own words for its end.
    fn panicked(mut self) -> String {
        self.guest.close_input();
        let ended = self.guest.wait(PANIC);
        ended.assert_ended(255, "panic");
        let console = ended.record.console();
        let after = |words: &str| {
            let rest = console.lines().find_map(|line| line.split_once(words).map(|(_, rest)| rest));
            rest.unwrap_or("nothing").trim().to_owned()
        };
        format!("panic: {}; {}", after(GIVES_UP), after(SAYS))
    }
}

/// read(2) of a bad sector past the page cache.
fn read_of_device(at: Fatal) -> String {
    at.guest.ctl(&["poison", "add", "p0", "0x1240+64"]);
    let device = at.device.clone();
    // What dd says of its end is the only thing that has these words.
    at.outcome(
        &format!(
            "/usr/bin/dd if={device} of=/dev/null bs=4096 skip=1 count=1 iflag=direct 2>&1 | \
             sed -n 's/.*Input.output error/E''IO/p'"
        ),
        "EIO",
    )
}

/// read(2) of a file in memory, whose page is bad: the kernel loads what is its own.
fn read_of_page_cache(mut at: Fatal) -> String {
    let file = "/tmp/file";
    let requests = [
        Request::Create(file.into(), 1 << 16),
        Request::Map(Source::File(file.into())),
        Request::Load(0x2000),
        Request::Physical(0x2240),
    ];
    let replies = at.workload.ask_all(&mut at.guest, &requests);
    let Reply::At(gpa) = replies[3] else { panic!("where the page is: {replies:?}") };
    at.guest.ctl(&["poison", "add", "ram", &format!("{gpa:#x}+64")]);
    at.outcome(&format!("echo 'read {file} 0x2000 0x1000' >&9; sleep 20; echo SUR''VIVED"), SURVIVED)
}

/// An error that says that the processor's context is corrupt.
fn context_corrupt(at: Fatal) -> String {
    let gpa = at.gpa;
    at.guest.ctl(&["mce", "--class", "fatal", "--address", &format!("{gpa:#x}")]);
    at.outcome("sleep 20; echo SUR''VIVED", SURVIVED)
}

/// A process loads poison.
fn load(mut at: Fatal) -> String {
    let requests = [Request::Map(Source::Anonymous(1 << 16)), Request::Physical(0x2240)];
    let replies = at.workload.ask_all(&mut at.guest, &requests);
    let Reply::At(gpa) = replies[1] else { panic!("where the page is: {replies:?}") };
    at.guest.ctl(&["poison", "add", "ram", &format!("{gpa:#x}+64")]);
    at.outcome("echo 'load 0x2240' >&9; tail -n 1 -f /tmp/replies0", "signal 7 4")
}
