//! What a guest kernel may complain of, and why.

/// A line of warning or worse that is expected.
struct Known {
    /// Beginning of the release of the kernels that print it; empty for all.
    release: &'static str,
    /// Part of the line.
    text: &'static str,
    /// Why it is printed, and is no fault of the machine.
    reason: &'static str,
}

const KNOWN: [Known; 9] = [
    Known {
        release: "",
        text: "Speculative Return Stack Overflow: ",
        reason: "the processor is the host's, and so is its microcode",
    },
    Known { release: "", text: "hw-vuln/", reason: "the processor is the host's, and so is its microcode" },
    Known {
        release: "6.1.",
        text: "PCI: Fatal: No config space access function found",
        reason: "the machine has no ports for PCI: 6.1 looks for them before it reads where ECAM is",
    },
    Known {
        release: "",
        text: "Failed to access perfctr msr",
        reason: "there are no performance counters, and Linux says so where it sees no hypervisor",
    },
    Known {
        release: "",
        text: "hrtimer: interrupt took ",
        reason: "a vCPU waited for a processor of the host",
    },
    Known {
        release: "",
        text: "clocksource: Long readout interval, skipping watchdog check",
        reason: "a vCPU waited for a processor of the host",
    },
    Known {
        release: "7.",
        text: "clocksource: Marking clocksource tsc unstable due to frequency skew",
        reason: SKEW,
    },
    Known { release: "7.", text: "clocksource: Watchdog ", reason: SKEW },
    Known { release: "7.", text: "clocksource: Clocksource ", reason: SKEW },
];

const SKEW: &str =
    "7.x holds two clocks against each other for 50 us, in which a vCPU waited for a processor of the host";

/// The lines of `dmesg -r` that are warnings or worse (levels 0 to 4) and not expected of this kernel.
pub fn complaints(release: &str, raw: &str) -> Vec<String> {
    let known = |line: &str| {
        KNOWN.iter().any(|known| {
            debug_assert!(!known.reason.is_empty());
            release.starts_with(known.release) && line.contains(known.text)
        })
    };
    raw.lines()
        .filter(|line| matches!(line.as_bytes(), [b'<', b'0'..=b'4', b'>', ..]) && !known(line))
        .map(str::to_owned)
        .collect()
}

/// The number after `key` in the first line of a kernel log that contains it: `number(log, "tsc: Detected ")`.
pub fn number(log: &str, key: &str) -> Option<f64> {
    let (_, rest) = log.split_once(key)?;
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    rest[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unexpected_warnings_are_complaints() {
        let raw = "<6>[ 0.1] Linux version\n<3>[ 1.0] PCI: Fatal: No config space access function found\n\
                   <4>[ 2.0] BUG: something\n<12>[ 3.0] systemd: x";
        assert_eq!(complaints("6.1.0-50-cloud-amd64", raw), ["<4>[ 2.0] BUG: something"]);
        assert_eq!(complaints("6.12.107", raw).len(), 2, "an excuse of 6.1 is none of 6.12");
    }

    #[test]
    fn numbers_are_found_in_logs() {
        assert_eq!(number("[0.1] tsc: Detected 2596.110 MHz processor", "tsc: Detected "), Some(2596.11));
        assert_eq!(number("", "tsc: Detected "), None);
    }
}
