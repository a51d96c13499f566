//! The root of the first-level machine of the nested host: the root of the machine
//! outside, read-only over 9p, with an overlay in memory on top, so that every program
//! and file of the outer machine is there under its own path.

use std::fs::{self, File};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use aconite_agent::config::{self, ROOT_OPTIONS, ROOT_TAG, SHARES_FILE};
use aconite_agent::protocol::Share;

use crate::boot;
use crate::sys;

const LOWER: &str = "/aconite/lower";
const MEMORY: &str = "/aconite/memory";
const ROOT: &str = "/aconite/root";

/// Mounts the root, moves into it, and mounts the shares there. Returns notes on shares that failed.
///
/// # Errors
/// There is no root to serve from, in words.
pub fn enter() -> Result<Vec<String>, String> {
    // Read before the old root is out of reach.
    let shares = match fs::read(SHARES_FILE) {
        Ok(text) => config::parse_shares(&text).map_err(|error| format!("{SHARES_FILE}: {error}"))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(format!("Cannot read {SHARES_FILE}: {error}")),
    };
    let lower = Share { tag: ROOT_TAG.into(), path: LOWER.as_bytes().to_vec(), options: ROOT_OPTIONS.into() };
    boot::mount_share(&lower).map_err(|error| format!("Cannot mount the 9p share `{ROOT_TAG}`: {error}"))?;
    overlay().map_err(|error| format!("Cannot lay memory over the root: {error}"))?;
    move_into().map_err(|error| format!("Cannot move into the new root: {error}"))?;
    let failed = |share: &Share| {
        let error = boot::mount_share(share).err()?;
        let path = String::from_utf8_lossy(&share.path);
        Some(format!("Cannot mount the 9p share `{}` on {path}: {error}", share.tag))
    };
    Ok(shares.iter().filter_map(failed).collect())
}

fn overlay() -> std::io::Result<()> {
    fs::create_dir_all(MEMORY)?;
    fs::create_dir_all(ROOT)?;
    sys::mount("tmpfs", Path::new(MEMORY), Some("tmpfs"), 0, "mode=755")?;
    let (upper, work) = (format!("{MEMORY}/upper"), format!("{MEMORY}/work"));
    fs::create_dir(&upper)?;
    fs::create_dir(&work)?;
    let options = format!("lowerdir={LOWER},upperdir={upper},workdir={work}");
    sys::mount("overlay", Path::new(ROOT), Some("overlay"), 0, &options)
}

fn move_into() -> std::io::Result<()> {
    for mounted in ["dev", "proc", "sys", "run", "tmp"] {
        let target = Path::new(ROOT).join(mounted);
        fs::create_dir_all(&target)?;
        let source = format!("/{mounted}");
        sys::mount(&source, &target, None, libc::MS_MOVE, "")?;
    }
    std::env::set_current_dir(ROOT)?;
    sys::mount(".", Path::new("/"), None, libc::MS_MOVE, "")?;
    std::os::unix::fs::chroot(".")?;
    std::env::set_current_dir("/")
}

/// Waits until the kernel has measured its TSC for the second time and trusts it (`tsc_refine_calibration_work` in
/// arch/x86/kernel/tsc.c), some three seconds after its start. Before KVM is loaded: it takes over the rate that it
/// finds, and guests that started while the kernel's clock changed have hung in their own clocks' checks.
pub fn settle_clock() -> Result<(), String> {
    const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    const LIMIT: Duration = Duration::from_secs(10);
    let start = Instant::now();
    loop {
        let clock = fs::read_to_string(CLOCK).unwrap_or_default();
        if clock.trim() == "tsc" {
            return Ok(());
        }
        if start.elapsed() > LIMIT {
            return Err(format!("The clock is {:?} and not the TSC", clock.trim()));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// Leaves the first processor, with everything that is started from here on, if there are others: no guest may run there.
///
/// Each thread of QEMU that restores the state of an FPU clears a bit (HF2_IGNNE) in a word of the first processor, and
/// not atomically (`cpu_clear_ignne()` in target/i386/tcg/system/fpu_helper.c, by `cpu_set_fpus()`). The word also has the
/// global interrupt flag and whether a guest runs on nested page tables, which CLGI, STGI, VMRUN and #VMEXIT change: one
/// of these changes was undone now and then. The processor then took its own state for that of the guest.
pub fn leave_first_processor() -> Result<(), String> {
    match sys::leave_processor(0) {
        Err(error) if error.kind() != std::io::ErrorKind::InvalidInput => {
            Err(format!("Cannot leave the first processor: {error}"))
        }
        _ => Ok(()),
    }
}

/// `/dev/kvm` is there and can be opened; a note if not.
pub fn check_kvm() -> Result<(), String> {
    let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let virtualises = flags.split_whitespace().any(|word| word == "svm" || word == "vmx");
    match File::open("/dev/kvm") {
        Ok(_) if virtualises => Ok(()),
        Ok(_) => Err("The processor has neither svm nor vmx".into()),
        Err(error) => Err(format!("Cannot open /dev/kvm: {error}")),
    }
}
