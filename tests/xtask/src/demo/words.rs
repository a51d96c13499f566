//! Replies, events and files of the guest in words.

use aconite_agent::workload::{Reply, SIGBUS, Signal, pattern};
use serde_json::Value;

/// Instructions of the kernel whose stale accesses are shown; all are in the result.
const SHOWN: usize = 6;
/// The code of a SIGBUS for an address without a page behind it.
const BUS_ADRERR: i32 = 2;

/// Shows each access of a process, and the first of each instruction of the kernel.
pub fn show_stale(stale: &[Value]) {
    let (processes, kernel): (Vec<_>, Vec<_>) = stale.iter().partition(|event| event["cpl"] == 3);
    for event in processes {
        println!("  stale access: {}", access(event));
    }
    let mut shown: Vec<&Value> = Vec::new();
    for event in &kernel {
        let known = shown.iter().any(|other| other["rip"] == event["rip"]);
        if !known && shown.len() < SHOWN {
            println!("  stale access: {}", access(event));
            shown.push(event);
        }
    }
    if kernel.len() > shown.len() {
        println!(
            "  and {} more reports of accesses by the kernel: all are in the result",
            kernel.len() - shown.len()
        );
    }
}

/// A stale access in words.
pub fn access(event: &Value) -> String {
    let who = if event["cpl"] == 3 { "a process" } else { "the kernel" };
    let va =
        event.get("va").map_or_else(|| "no virtual address".to_owned(), |va| format!("va {}", plain(va)));
    format!(
        "vCPU {}, RIP {}, CR3 {}, CPL {} ({who}), {va}, gpa {}, {} bytes, {}; {} {}; number {} of its kind",
        event["vcpu"],
        plain(&event["rip"]),
        plain(&event["cr3"]),
        event["cpl"],
        plain(&event["gpa"]),
        event["bytes"],
        plain(&event["direction"]),
        plain(&event["device"]),
        plain(&event["offset"]),
        event["count"]
    )
}

pub fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// What a load after the removal came to.
pub fn word(reply: &Reply, offset: u64) -> String {
    match reply {
        Reply::Loaded { word: u64::MAX, .. } => "gave all ones".into(),
        Reply::Loaded { word, .. } if *word == pattern(offset) => {
            format!("gave the old data, {word:#x}: it is still within reach")
        }
        Reply::Loaded { word, .. } => format!("gave {word:#x}"),
        other => done(other),
    }
}

/// What was done to the old mapping after the removal.
pub fn done(reply: &Reply) -> String {
    match reply {
        Reply::Done => "went through".into(),
        Reply::Signal(Signal { number, code, address, .. }) => {
            let name = if (*number, *code) == (SIGBUS, BUS_ADRERR) { " (SIGBUS, BUS_ADRERR)" } else { "" };
            format!("raised signal {number}, si_code {code}{name}, si_addr {address:#x}")
        }
        other => format!("ended in {other}"),
    }
}

/// Sectors of /sys/block/DEVICE/badblocks: each line is the first and their number.
pub fn bad_blocks(text: &str) -> Vec<(u64, u64)> {
    let pair = |line: &str| {
        let (first, count) = line.trim().split_once(' ')?;
        Some((first.parse().ok()?, count.parse().ok()?))
    };
    text.lines().filter_map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn bad_blocks_are_read() {
        assert_eq!(bad_blocks("65609 1\n65700 8\n"), [(65609, 1), (65700, 8)]);
        assert_eq!(bad_blocks("\n"), []);
    }

    #[test]
    fn accesses_in_words() {
        let event = json!({
            "device": "p0", "offset": "0x280240", "vcpu": 0, "rip": "0x401000", "cr3": "0x1234000", "cpl": 3,
            "va": "0x7f0000000240", "gpa": "0x100280240", "bytes": 8, "direction": "read", "count": 1
        });
        assert_eq!(
            access(&event),
            "vCPU 0, RIP 0x401000, CR3 0x1234000, CPL 3 (a process), va 0x7f0000000240, gpa 0x100280240, 8 bytes, read; \
             p0 0x280240; number 1 of its kind"
        );
        assert_eq!(word(&Reply::Loaded { word: u64::MAX, rip: 0 }, 0), "gave all ones");
        assert!(word(&Reply::Loaded { word: pattern(8), rip: 0 }, 8).contains("old data"));
    }
}
