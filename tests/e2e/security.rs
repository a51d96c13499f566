//! Passphrases of DIMMs: ndctl and the kernel's key service against the firmware's model.
//!
//! Linux enables nothing on a DIMM that it has unlocked or erased unless it can flush the caches of all processors, and
//! takes it that it cannot under a hypervisor (`cpu_cache_has_invalidate_memregion`): these guests see none.

use aconite_tests::machine::PMEM;
use aconite_tests::{Machine, Run};

const SECURITY: &str = "cat /sys/bus/nd/devices/nmem0/security";
const KEY: &str = "keyctl add user nvdimm-master 0123456789abcdef0123456789abcdef @u && keyctl link @u @s";

/// Carries out an ndctl command on nmem0 that says that it was done once.
#[track_caller]
fn ndctl(guest: &mut Machine, command: &str) {
    let reply = guest.ok(&format!("ndctl {command} 2>&1"));
    assert!(reply.contains("for 1 nmem") || reply.contains(" 1 nmem"), "{command}: {reply}");
}

/// A guest with the key that encrypts passphrases.
fn boot(kernel: &str, pmem: &str) -> Machine {
    let run = Run::kernel(kernel).size(2, "1G").pmem(pmem).tools(&["ndctl", "keyctl"]);
    let mut guest = run.args(["--cpu", "hypervisor=off"]).shell();
    guest.until_ok(&format!("{SECURITY} >/dev/null"), PMEM);
    guest.ok("mkdir -p /etc/ndctl/keys");
    guest.ok(KEY);
    guest
}

fn life(kernel: &str) {
    let dir = tempfile::tempdir().unwrap();
    let pmem = format!("file={},size=512M,id=p0", dir.path().join("p0.img").display());
    let boot = || boot(kernel, &pmem);

    let mut guest = boot();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest.scrubbed();
    guest.ok("echo secret > /dev/pmem0");
    assert_eq!(guest.ok(SECURITY), "disabled");
    guest.ok("ndctl disable-region all");
    ndctl(&mut guest, "setup-passphrase nmem0 -k user:nvdimm-master");
    assert_eq!(guest.ok(SECURITY), "unlocked");
    ndctl(&mut guest, "update-passphrase nmem0 -k user:nvdimm-master");
    let blob = guest.ok("cd /etc/ndctl/keys && ls *.blob");
    let key = guest.ok("cat /etc/ndctl/keys/*.blob");
    guest.finish("exit 0").assert_ended(0, "power_off");

    // Power has been off: the DIMM is locked, and Linux gets to none of its data.
    let mut guest = boot();
    assert_eq!(guest.ok(SECURITY), "locked");
    assert_ne!(guest.sh("test -b /dev/pmem0").status, 0);
    guest.ok(&format!("printf %s '{key}' > \"/etc/ndctl/keys/{blob}\""));
    guest.ok("ndctl load-keys 2>&1");
    guest.ok("ndctl disable-region all; ndctl disable-dimm nmem0; ndctl enable-dimm nmem0 2>&1");
    assert_eq!(guest.ok(SECURITY), "unlocked");
    guest.ok("ndctl enable-region all 2>&1");
    guest.until_ok("test -b /dev/pmem0", PMEM);
    assert_eq!(guest.ok("head -n 1 /dev/pmem0"), "secret");
    guest.ok("ndctl disable-region all");
    ndctl(&mut guest, "sanitize-dimm nmem0 --crypto-erase");
    assert_eq!(guest.ok(SECURITY), "disabled");
    guest.ok("ndctl enable-region all 2>&1");
    guest.until_ok("test -b /dev/pmem0", PMEM);
    assert_eq!(guest.ok("head -c 4096 /dev/pmem0 | tr -d '\\000' | wc -c"), "0", "all is erased");

    guest.ok("ndctl disable-region all");
    ndctl(&mut guest, "setup-passphrase nmem0 -k user:nvdimm-master");
    ndctl(&mut guest, "remove-passphrase nmem0");
    assert_eq!(guest.ok(SECURITY), "disabled");
    ndctl(&mut guest, "setup-passphrase nmem0 -k user:nvdimm-master");
    guest.ok("ndctl disable-dimm nmem0");
    ndctl(&mut guest, "sanitize-dimm nmem0 --overwrite");
    guest.ok("ndctl wait-overwrite nmem0 2>&1");
    assert_eq!(guest.ok(SECURITY), "disabled");
    guest.finish("exit 0").assert_ended(0, "power_off");
}

/// A locked DIMM answers with ones and takes nothing, to processors and to DMA, wherever the address comes from; its poison
/// cannot be changed. A wrong passphrase unlocks nothing, three of them nothing more until power goes; a frozen DIMM
/// keeps its state, and the master passphrase erases it.
fn locked(kernel: &str) {
    let dir = tempfile::tempdir().unwrap();
    let pmem = format!("file={},size=512M,id=p0", dir.path().join("p0.img").display());
    let boot = || boot(kernel, &pmem);
    let keys = |guest: &mut Machine| {
        let names = guest.ok("cd /etc/ndctl/keys && ls *.blob");
        let mut keys = Vec::new();
        for name in names.lines() {
            keys.push((name.to_owned(), guest.ok(&format!("cat \"/etc/ndctl/keys/{name}\""))));
        }
        keys
    };
    let mut guest = boot();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    guest.scrubbed();
    guest.ok("echo secret > /dev/pmem0");
    guest.ok("ndctl disable-region all");
    ndctl(&mut guest, "setup-passphrase nmem0 -k user:nvdimm-master -m");
    ndctl(&mut guest, "setup-passphrase nmem0 -k user:nvdimm-master");
    let device = guest.device("p0");
    assert_eq!(
        (&device["locked"], &device["dimms"][0]["secured"]),
        (&false.into(), &true.into()),
        "{device}"
    );
    let kept = keys(&mut guest);
    ndctl(&mut guest, "freeze-security nmem0");
    assert!(guest.ok(SECURITY).contains("unlocked"), "frozen, and what it was");
    for refused in ["remove-passphrase nmem0", "sanitize-dimm nmem0 --crypto-erase"] {
        let reply = guest.sh(&format!("ndctl {refused} 2>&1"));
        assert!(!reply.text.contains(" 1 nmem"), "{refused}: {}", reply.text);
    }
    guest.finish("exit 0").assert_ended(0, "power_off");

    let mut guest = boot();
    assert_eq!(guest.ok(SECURITY), "locked");
    let device = guest.device("p0");
    assert_eq!((&device["locked"], &device["dimms"][0]["locked"]), (&true.into(), &true.into()), "{device}");
    let start = device["gpa"].as_str().unwrap().to_owned();
    let before = guest.last_event();
    // Whatever reaches for it finds nobody.
    assert_eq!(guest.ok(&format!("devmem {start} 32")).to_lowercase(), "0xffffffff");
    guest.ok(&format!("devmem {start} 32 0x12345678"));
    let accesses = guest.events_named(before, "locked_access");
    let of = |direction: &str| accesses.iter().any(|a| a["device"] == "p0" && a["direction"] == direction);
    assert!(of("read") && of("write"), "{accesses:?}");
    let refused = guest.ctl_refused(&["poison", "add", "p0", "0x1000+64"]);
    assert_eq!(refused["code"], "wrong_device_state", "{refused}");
    // As on a link that is down, if that is what the test wants.
    guest.ctl(&["stale", "p0", "--answer", "machine-check"]);
    let killed = guest.sh(&format!("devmem {start} 32"));
    assert_eq!(killed.status, 128 + 7, "SIGBUS: {}", killed.text);
    guest.ctl(&["stale", "p0", "--answer", "ones"]);

    // A key that is none of its keys.
    let id = guest.ok("cat /sys/bus/nd/devices/nmem0/nfit/id");
    let enable = "ndctl disable-region all; ndctl disable-dimm nmem0; ndctl enable-dimm nmem0 2>&1";
    guest.ok(&format!("keyctl add encrypted nvdimm:{id} 'new enc32 user:nvdimm-master 32' @u"));
    for _ in 0..3 {
        guest.sh(enable);
        assert_eq!(guest.ok(SECURITY), "locked");
    }
    guest.ok(&format!("keyctl unlink $(keyctl search @u encrypted nvdimm:{id}) @u"));
    for (name, key) in &kept {
        guest.ok(&format!("printf %s '{key}' > \"/etc/ndctl/keys/{name}\""));
    }
    guest.ok("ndctl load-keys 2>&1");
    guest.sh(enable);
    assert_eq!(guest.ok(SECURITY), "locked", "no more attempts before power goes");
    guest.finish("exit 0").assert_ended(0, "power_off");

    let mut guest = boot();
    for (name, key) in &kept {
        guest.ok(&format!("printf %s '{key}' > \"/etc/ndctl/keys/{name}\""));
    }
    guest.ok("ndctl load-keys 2>&1");
    let before = guest.last_event();
    guest.sh(enable);
    assert_eq!(guest.ok(SECURITY), "unlocked");
    let unlocked = guest.events_named(before, "memory_lock");
    assert_eq!((unlocked.len(), &unlocked[0]["locked"]), (1, &false.into()), "{unlocked:?}");
    guest.ok("ndctl enable-region all 2>&1");
    guest.until_ok("test -b /dev/pmem0", PMEM);
    assert_eq!(
        guest.ok("head -n 1 /dev/pmem0"),
        "secret",
        "what was stored while it was locked went nowhere"
    );
    guest.ok("ndctl disable-region all");
    // `ndctl load-keys` loads no master passphrases, and erases by one of zeroes where there is none.
    let (_, master) = kept.iter().find(|(name, _)| name.starts_with("nvdimm-master")).expect("its key");
    guest.ok(&format!("keyctl add encrypted nvdimm-master:{id} 'load {master}' @u"));
    ndctl(&mut guest, "sanitize-dimm nmem0 --crypto-erase --master-passphrase");
    assert_eq!(guest.ok(SECURITY), "disabled");
    guest.ok("ndctl enable-region all 2>&1");
    guest.until_ok("test -b /dev/pmem0", PMEM);
    assert_eq!(guest.ok("head -c 4096 /dev/pmem0 | tr -d '\\000' | wc -c"), "0", "all is erased");
    guest.finish("exit 0").assert_ended(0, "power_off");
}

#[test]
#[ignore = "wide"]
fn a_locked_dimm_answers_nobody() {
    locked("6.12");
}

#[test]
#[ignore = "wide"]
fn a_locked_dimm_answers_nobody_on_6_1() {
    locked("6.1");
}

#[test]
#[ignore = "wide"]
fn a_locked_dimm_answers_nobody_on_7() {
    locked("7.x");
}

#[test]
fn a_passphrase_locks_the_dimm_when_power_goes() {
    life("6.12");
}

#[test]
#[ignore = "wide"]
fn a_passphrase_locks_the_dimm_when_power_goes_on_6_1() {
    life("6.1");
}

#[test]
#[ignore = "wide"]
fn a_passphrase_locks_the_dimm_when_power_goes_on_7() {
    life("7.x");
}
