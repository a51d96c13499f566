//! Guests boot, run commands, and end; every end is told apart.

use aconite_tests::environment::kernel_image;
use aconite_tests::machine::{BOOT, PMEM};
use aconite_tests::{Machine, Run, kernel_log};
use serde_json::Value;
use std::fs;
use std::io::Read;
use std::time::{Duration, Instant};

/// Boots a guest of this size and looks at what it has: all processors online and working, all memory there, no
/// complaint of the kernel.
fn booted(kernel: Option<&str>, cpus: u32, memory: &str, mebibytes: u64) -> Machine {
    let run = kernel.map_or_else(Run::new, Run::kernel);
    let mut guest = run.size(cpus, memory).shell();
    assert_eq!(guest.ok("nproc"), cpus.to_string());
    assert_eq!(
        guest.ok("cat /sys/devices/system/cpu/online"),
        if cpus == 1 { "0".to_owned() } else { format!("0-{}", cpus - 1) }
    );
    // Each processor runs what is bound to it.
    for cpu in 0..cpus {
        assert_eq!(
            guest.ok(&format!("taskset -c {cpu} sh -c \"cut -d ' ' -f 39 /proc/self/stat\"")),
            cpu.to_string()
        );
    }
    let total: u64 = guest.ok("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo").parse().unwrap();
    let (total, all) = (total / 1024, mebibytes);
    assert!(total <= all && total > all * 9 / 10, "{total} MiB of {all} MiB");
    let release = guest.ok("uname -r");
    let complaints = kernel_log::complaints(&release, &guest.ok("dmesg -r"));
    assert!(complaints.is_empty(), "{release} complains:\n{}", complaints.join("\n"));
    guest
}

#[test]
fn one_processor_and_the_commands_status() {
    let ended = booted(None, 1, "512M", 512).finish("exit 7");
    ended.assert_ended(7, "power_off");
    assert_eq!(ended.result()["command_status"], 7);
    for event in ["machine_started", "agent_ready", "powered_off", "machine_stopped"] {
        assert!(ended.has_event(event), "{event}");
    }
}

#[test]
fn two_processors_and_a_signal() {
    let ended = booted(None, 2, "2G", 2048).finish("kill -9 $$");
    ended.assert_ended(128 + 9, "power_off");
    let exits = ended.record.events();
    let exit = exits.iter().find(|event| event["event"] == "command_exited").expect("the end of the command");
    assert_eq!((&exit["signal"], &exit["status"]), (&Value::from(9), &Value::Null));
}

#[test]
fn four_processors_memory_above_the_hole_and_a_panic() {
    let mut guest = booted(None, 4, "5G", 5120);
    // Memory is on both sides of the hole below 4 GiB, and all of it can be written.
    let ram = guest.ok("grep 'System RAM' /proc/iomem");
    assert!(ram.contains("-bfffffff : System RAM"), "{ram}");
    assert!(ram.contains("100000000-17fffffff : System RAM"), "{ram}");
    // The kernel takes memory above the hole first.
    let zeroes = "dd if=/dev/zero bs=1M count=300 of=/tmp/zeroes 2>/dev/null && wc -c < /tmp/zeroes";
    assert_eq!(guest.ok(zeroes), (300 << 20).to_string());
    let ended = guest.finish("echo c > /proc/sysrq-trigger");
    ended.assert_ended(255, "panic");
    assert!(ended.has_event("guest_panicked"));
    assert!(ended.stderr.contains("Kernel panic - not syncing: sysrq triggered crash"), "{}", ended.stderr);
}

#[test]
fn kernel_6_1() {
    booted(Some("6.1"), 2, "1G", 1024).finish("exit 0").assert_ended(0, "power_off");
}

#[test]
fn kernel_7() {
    booted(Some("7.x"), 2, "1G", 1024).finish("exit 0").assert_ended(0, "power_off");
}

#[test]
#[ignore = "wide: every kernel with 1 and 4 processors"]
fn every_kernel_and_size() {
    for kernel in ["6.1", "6.12", "7.x"] {
        for (cpus, memory, mebibytes) in [(1, "512M", 512), (2, "3G", 3072), (4, "5G", 5120)] {
            booted(Some(kernel), cpus, memory, mebibytes).finish("exit 3").assert_ended(3, "power_off");
        }
    }
}

#[test]
fn a_reset_is_no_poweroff() {
    let ended = Run::new().output(&["reboot", "-f"]);
    ended.assert_ended(254, "reset");
    assert!(
        ended.has_event("reset") && !ended.has_event("powered_off") && !ended.has_event("guest_panicked")
    );
    assert!(ended.stderr.contains("reset"), "{}", ended.stderr);
}

#[test]
fn a_triple_fault_is_told_apart() {
    // The kernel resets itself with an interrupt through an empty table.
    let ended = Run::new().args(["--append", "reboot=t"]).output(&["reboot", "-f"]);
    ended.assert_ended(255, "triple_fault");
    assert!(ended.stderr.contains("triple fault"), "{}", ended.stderr);
    assert!(!ended.has_event("guest_panicked"));
}

#[test]
fn streams_and_a_missing_command() {
    let run = Run::new().args(["--file", "/etc/hostname:/tmp/in"]);
    let ended = run.output(&["sh", "-c", "echo out; echo err >&2; cat; nosuchcommand; exit $?"]);
    ended.assert_ended(127, "power_off");
    assert_eq!(ended.stdout, "out\n");
    assert!(ended.stderr.contains("err\n") && ended.stderr.contains("nosuchcommand"), "{}", ended.stderr);
}

#[test]
fn a_command_that_is_nowhere() {
    let ended = Run::new().output(&["/no/such/program"]);
    assert_eq!(ended.code(), Some(127), "{}", ended.stderr);
    assert!(ended.stderr.contains("/no/such/program"), "{}", ended.stderr);
}

#[test]
fn the_time_is_over() {
    let start = Instant::now();
    let ended = Run::new().args(["--timeout", "25s"]).output(&["sleep", "1000"]);
    ended.assert_ended(124, "timeout");
    assert!(start.elapsed() > Duration::from_secs(25), "{:?}", start.elapsed());
    assert!(ended.stderr.contains("--timeout"), "{}", ended.stderr);
}

#[test]
fn a_hang_before_init() {
    // A first process that is no agent and never ends.
    let run = Run::new().args(["--timeout", "40s", "--append", "rdinit=/bin/busybox -- sleep 1000"]);
    let ended = run.output(&["true"]);
    ended.assert_ended(124, "timeout");
    assert!(!ended.has_event("agent_ready"));
    assert!(ended.stderr.contains("console's last lines"), "{}", ended.stderr);
}

#[test]
fn control_c_reaches_the_command() {
    let script = "trap 'echo got INT; exit 9' INT; echo ready; while :; do sleep 0.2; done";
    let guest = Run::new().start(&["sh", "-c", script]);
    guest.wait_for_output("ready\n", BOOT);
    guest.signal("INT");
    let ended = guest.wait(Duration::from_secs(60));
    ended.assert_ended(9, "power_off");
    assert_eq!(ended.stdout, "ready\ngot INT\n");
}

#[test]
fn two_machines_at_once() {
    let mut one = Run::new().size(1, "512M").start(&["sh"]);
    let mut two = Run::new().size(1, "512M").shell();
    one.wait_for_shell();
    assert_eq!(one.ok("echo $((6 * 7))"), "42");
    assert_eq!(two.ok("cat /proc/uptime | wc -w"), "2");
    assert_eq!(
        (&one.ctl(&["info"])["state"], &two.ctl(&["info"])["state"]),
        (&"running".into(), &"running".into())
    );
    // The end of one is none of the other's.
    one.finish("exit 1").assert_ended(1, "power_off");
    assert_eq!(two.ok("echo still here"), "still here");
    two.finish("exit 2").assert_ended(2, "power_off");
}

#[test]
fn a_plain_elf_image() {
    // What a bzImage carries is a vmlinux: scripts/extract-vmlinux of the kernel in short.
    let image = fs::read(kernel_image("6.12")).unwrap();
    let field = |offset: usize| u32::from_le_bytes(image[offset..offset + 4].try_into().unwrap()) as usize;
    // Boot protocol 2.08: setup_sects at 0x1f1, payload_offset at 0x248, payload_length at 0x24c.
    let start = (usize::from(image[0x1f1]) + 1) * 512 + field(0x248);
    let payload = &image[start..start + field(0x24c)];
    let mut vmlinux = Vec::new();
    ruzstd::decoding::StreamingDecoder::new(payload).unwrap().read_to_end(&mut vmlinux).unwrap();
    assert_eq!(vmlinux[..4], *b"\x7fELF");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmlinux");
    fs::write(&path, vmlinux).unwrap();
    let modules = kernel_image("6.12").with_file_name("lib").join("modules");
    let run =
        Run::image(path).args(["--cpus", "2", "--pmem", "size=256M,id=p0", "--modules"]).args([modules]);
    let mut guest = run.shell();
    assert!(guest.ok("uname -r").starts_with("6.12."));
    assert_eq!(guest.ok("nproc"), "2");
    assert_eq!(guest.until_ok("cat /sys/block/pmem0/size", PMEM), (256 << 11).to_string());
    guest.finish("exit 5").assert_ended(5, "power_off");
}
