//! What a guest kernel's log says happened, in words.
//!
//! Only messages that this demo can provoke, and the usual signs of damage, are known here: the rest of the log is in
//! the run directory.

use serde::Serialize;

/// A kind of message: how the line begins (`^`) or a part of it, what it means, and whether it is a sign of damage in
/// the kernel.
const KINDS: [(&str, &str, bool); 15] = [
    ("^Kernel panic", "the kernel panicked", true),
    ("^BUG: ", "the kernel crashed (oops)", true),
    ("^Oops: ", "the kernel crashed (oops)", true),
    ("^general protection fault", "the kernel crashed (oops)", true),
    ("^kernel BUG at", "the kernel stopped at an assertion", true),
    ("^WARNING: ", "the kernel warned of a state it should not be in", true),
    ("blocked for more than", "a task hangs in the kernel", true),
    ("rcu_preempt detected stalls", "a processor hangs in the kernel", true),
    ("soft lockup", "a processor hangs in the kernel", true),
    ("^mce: Uncorrected hardware memory error", "a machine check reported poison", false),
    ("Sending SIGBUS", "the kernel sent SIGBUS because of poison", false),
    ("recovery action", "the kernel took the poisoned page out of use", false),
    ("shut down requested", "the file system shut itself down", false),
    ("Aborting journal", "the journal was aborted", false),
    ("I/O error", "reads or writes of the block device failed", false),
];

/// Lines that belong to a finding before them.
const FOLLOWING: usize = 40;

/// A kind of message that was found, with the first line that says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it means.
    pub meaning: &'static str,
    /// Whether it is a sign of damage in the kernel.
    pub damage: bool,
    /// How many lines say so.
    pub lines: usize,
    /// The first of them, without its time.
    pub first: String,
    /// The function in which it happened, of a crash or warning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub function: Option<String>,
}

/// The findings in a log, in the order of their first lines.
pub fn classify(log: &str) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Vec::new();
    let lines: Vec<&str> = log.lines().map(without_time).collect();
    for (index, line) in lines.iter().enumerate() {
        let says = |part: &str| match part.strip_prefix('^') {
            Some(beginning) => line.starts_with(beginning),
            None => line.contains(part),
        };
        let Some((_, meaning, damage)) = KINDS.iter().find(|(part, ..)| says(part)) else {
            continue;
        };
        if let Some(known) = findings.iter_mut().find(|finding| finding.meaning == *meaning) {
            known.lines += 1;
            continue;
        }
        let following = &lines[index..lines.len().min(index + FOLLOWING)];
        let function = damage.then(|| following.iter().find_map(|line| function(line))).flatten();
        findings.push(Finding { meaning, damage: *damage, lines: 1, first: (*line).to_owned(), function });
    }
    findings
}

/// The message behind `[    1.234567] `.
fn without_time(line: &str) -> &str {
    let line = line.trim_end();
    let Some(rest) = line.strip_prefix('[') else { return line };
    match rest.split_once("] ") {
        Some((time, message)) if time.trim().parse::<f64>().is_ok() => message,
        _ => line,
    }
}

/// `dax_disassociate_entry+0x35/0x70` of `RIP: 0010:dax_disassociate_entry+0x35/0x70`. The code segment is the kernel's.
fn function(line: &str) -> Option<String> {
    let place = line.trim_start().strip_prefix("RIP: 0010:")?;
    place.split_whitespace().next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_put_in_words() {
        let log = "\
[    0.818254] Speculative Return Stack Overflow: WARNING: See the documentation\r
[    5.100000] mce: Uncorrected hardware memory error in user-access at 12020a240\r
[    5.110000] Memory failure: 0x100a0a: Sending SIGBUS to aconite-agent:100 due to hardware memory corruption\r
[    5.120000] Memory failure: 0x100a0a: recovery action for dax page: Recovered\r
[    8.000000] EXT4-fs (pmem0): shut down requested (2)\r
[    8.010000] Aborting journal on device pmem0-8.\r
[    9.000000] BUG: unable to handle page fault for address: ffffea0004008018\r
[    9.000100] #PF: supervisor read access in kernel mode\r
[    9.000200] Oops: Oops: 0000 [#1] PREEMPT SMP NOPTI\r
[    9.000300] RIP: 0010:dax_disassociate_entry+0x35/0x70\r
[    9.000400] Code: 48 89\r
[    9.000500] RIP: 0033:0x7f0000000000\r
";
        let findings = classify(log);
        let meanings: Vec<_> =
            findings.iter().map(|finding| (finding.meaning, finding.damage, finding.lines)).collect();
        assert_eq!(
            meanings,
            [
                ("a machine check reported poison", false, 1),
                ("the kernel sent SIGBUS because of poison", false, 1),
                ("the kernel took the poisoned page out of use", false, 1),
                ("the file system shut itself down", false, 1),
                ("the journal was aborted", false, 1),
                ("the kernel crashed (oops)", true, 2),
            ]
        );
        let oops = &findings[5];
        assert_eq!(oops.first, "BUG: unable to handle page fault for address: ffffea0004008018");
        assert_eq!(oops.function.as_deref(), Some("dax_disassociate_entry+0x35/0x70"));
        assert_eq!(findings[3].function, None);
    }

    #[test]
    fn an_ordinary_log_has_no_findings() {
        assert_eq!(classify("[    0.000000] Linux version 6.12\n[ not a time] EXT4-fs mounted\n\n"), []);
        assert_eq!(without_time("[    1.5] x"), "x");
        assert_eq!(without_time("[abc] x"), "[abc] x");
    }
}
