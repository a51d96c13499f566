//! A guest without an operating system: what an error costs with nothing but the monitor between it and the guest.
//!
//! It loads a word again and again. When that ends in a machine check, it says how many ticks of the time-stamp counter
//! passed from before the load to the first instruction of the handler (`T`), waits, and goes on; the first load that
//! succeeds again is told with its ticks (`G`). Of a machine check at any other place it says what its counter was at the
//! handler's first instruction (`M`); what KVM adds to the counter for the guest is known.

use super::pmem::Poisoned;
use crate::plan::{Added, Layout, Plan, Trap};
use aconite::api::Client;
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::arch::global_asm;
use std::arch::x86_64::_rdtsc;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// Where the guest's program is in its memory, and where it is entered, by the 64-bit boot protocol.
const BASE: u64 = 0x100_0000;
/// The word that it loads.
const VICTIM: u64 = BASE + 0x10_0240;
/// Bytes of its program, its table of vectors and its stack.
const LENGTH: u64 = 0x10000;
const ROUNDS: usize = 10;
/// How long a line may take.
const LINE: Duration = Duration::from_secs(20);
/// How long the time-stamp counter is compared with the clock.
const CALIBRATION: Duration = Duration::from_millis(100);

global_asm!(
    ".pushsection .rodata.aconite_bare, \"a\"",
    "aconite_bare:",
    "mov rsp, {base} + 0x8000",
    // Vector 18: an interrupt gate on the segment that is there.
    "lea rax, [rip + 4f]",
    "mov edi, {base} + 0x4000 + 18 * 16",
    "mov word ptr [rdi], ax",
    "mov ecx, cs",
    "mov word ptr [rdi + 2], cx",
    "mov word ptr [rdi + 4], 0x8e00",
    "shr rax, 16",
    "mov word ptr [rdi + 6], ax",
    "shr rax, 16",
    "mov dword ptr [rdi + 8], eax",
    "mov dword ptr [rdi + 12], 0",
    "mov word ptr [rdi + 0x200], 0xfff",
    "mov qword ptr [rdi + 0x202], {base} + 0x4000",
    "lidt [rdi + 0x200]",
    "mov rax, cr4",
    "or rax, 0x40",
    "mov cr4, rax",
    "mov ebx, 'R'",
    "xor eax, eax",
    "call 7f",
    // r12: whether a load is under way; r13: its start; r14: whether the last one failed.
    "xor r12d, r12d",
    "xor r14d, r14d",
    "2:",
    "rdtsc",
    "shl rdx, 32",
    "lea r13, [rax + rdx]",
    "mov r12d, 1",
    "mov rcx, qword ptr [{victim}]",
    "xor r12d, r12d",
    "rdtsc",
    "shl rdx, 32",
    "add rax, rdx",
    "sub rax, r13",
    "test r14d, r14d",
    "jz 3f",
    "xor r14d, r14d",
    "mov ebx, 'G'",
    "call 7f",
    "3:",
    "mov ecx, 1000",
    "5:",
    "pause",
    "dec ecx",
    "jnz 5b",
    "jmp 2b",
    // The handler.
    "4:",
    "test r12d, r12d",
    "jz 6f",
    "rdtsc",
    "shl rdx, 32",
    "add rax, rdx",
    "sub rax, r13",
    "xor r12d, r12d",
    "mov r14d, 1",
    "mov ebx, 'T'",
    "call 7f",
    "mov ecx, 1000000",
    "5:",
    "pause",
    "dec ecx",
    "jnz 5b",
    // The machine check is over; the load begins anew.
    "lea rax, [rip + 2b]",
    "mov qword ptr [rsp], rax",
    "jmp 8f",
    // No line is being written: nothing of what that takes is in use.
    "6:",
    "push rax",
    "push rdx",
    "rdtsc",
    "shl rdx, 32",
    "add rax, rdx",
    "mov ebx, 'M'",
    "call 7f",
    "pop rdx",
    "pop rax",
    "8:",
    "push rax",
    "push rcx",
    "push rdx",
    "mov ecx, 0x17a",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "pop rdx",
    "pop rcx",
    "pop rax",
    "iretq",
    // Writes the letter in bl, and rax in hexadecimal.
    "7:",
    "mov rsi, rax",
    "mov edx, 0x3f8",
    "mov al, bl",
    "out dx, al",
    "mov al, ' '",
    "out dx, al",
    "mov edi, 16",
    "5:",
    "rol rsi, 4",
    "mov eax, esi",
    "and eax, 15",
    "add al, '0'",
    "cmp al, '9'",
    "jbe 6f",
    "add al, 'a' - '0' - 10",
    "6:",
    "out dx, al",
    "dec edi",
    "jnz 5b",
    "mov al, 10",
    "out dx, al",
    "ret",
    "aconite_bare_end:",
    ".popsection",
    base = const BASE,
    victim = const VICTIM,
);

unsafe extern "C" {
    static aconite_bare: u8;
    static aconite_bare_end: u8;
}

/// The program as an ELF file with one segment (System V ABI, gABI 4.1, chapters 4 and 5).
fn image() -> Vec<u8> {
    let (start, end) = (&raw const aconite_bare, &raw const aconite_bare_end);
    // SAFETY: both symbols are of one section of this program, in this order.
    let code = unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) };
    let (header, program) = (64u64, 56u64);
    let offset = header + program;
    let mut image = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let fields: [(u64, usize); 21] = [
        // Executable, x86-64, version 1; entry, program headers, no sections, flags; sizes and counts.
        (2, 2),
        (62, 2),
        (1, 4),
        (BASE, 8),
        (header, 8),
        (0, 8),
        (0, 4),
        (header, 2),
        (program, 2),
        (1, 2),
        (64, 2),
        (0, 2),
        (0, 2),
        // PT_LOAD, read, write and execute.
        (1, 4),
        (7, 4),
        (offset, 8),
        (BASE, 8),
        (BASE, 8),
        (code.len() as u64, 8),
        (LENGTH, 8),
        (16, 8),
    ];
    for (value, size) in fields {
        image.extend_from_slice(&value.to_le_bytes()[..size]);
    }
    image.extend_from_slice(code);
    image
}

/// The guest while it runs. It is killed when this is dropped.
pub struct Bare {
    child: Child,
    lines: Receiver<String>,
    client: Client,
    socket: PathBuf,
    errors: PathBuf,
}

impl Bare {
    /// Starts it with these options beside its own.
    pub fn start(plan: &Plan, options: &[&str]) -> Result<Self> {
        let (kernel, socket, errors) =
            (plan.dir.join("bare"), plan.dir.join("bare.sock"), plan.dir.join("bare.errors"));
        std::fs::write(&kernel, image())?;
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new(plan.dir.join("aconite"));
        command.args(["run", "--host=kvm", "--no-agent", "--cpus=1", "--memory=64M"]).args(options);
        command.arg("--kernel").arg(kernel).arg("--api-socket").arg(&socket);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(&errors)?);
        let mut child = command.spawn().context("Cannot start aconite")?;
        let output = BufReader::new(child.stdout.take().context("No standard output")?);
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in output.lines() {
                if !line.is_ok_and(|line| sender.send(line).is_ok()) {
                    return;
                }
            }
        });
        let mut bare = Bare { child, lines, client: Client::new(&socket), socket, errors };
        bare.line('R')?;
        Ok(bare)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The number of the next line that begins with `letter`.
    fn line(&mut self, letter: char) -> Result<u64> {
        loop {
            let Ok(line) = self.lines.recv_timeout(LINE) else {
                let errors = std::fs::read_to_string(&self.errors).unwrap_or_default();
                bail!("The bare guest does not say {letter}: {errors}");
            };
            if let Some(number) = line.trim().strip_prefix(letter) {
                return Ok(u64::from_str_radix(number.trim(), 16)?);
            }
        }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The time-stamp counter.
fn counter() -> u64 {
    // SAFETY: reading it changes nothing.
    unsafe { _rdtsc() }
}

/// Ticks of the time-stamp counter in a nanosecond.
fn ticks() -> f64 {
    let (start, before) = (Instant::now(), counter());
    std::thread::sleep(CALIBRATION);
    (counter() - before) as f64 / start.elapsed().as_nanos() as f64
}

/// A poisoned line that is loaded, cleared and loaded; and a machine check by request. The shortest of many, each.
pub fn trap(plan: &Plan) -> Result<Trap> {
    let ticks = ticks();
    let mut bare = Bare::start(plan, &[])?;
    let mut best = Trap { trap: f64::MAX, good: f64::MAX, clear: f64::MAX, latency: f64::MAX };
    let range = json!({ "ranges": [{ "offset": VICTIM & !63, "length": 64 }] });
    for _ in 0..ROUNDS {
        bare.client.call("POST", "/v1/memory/ram/poison", Some(&range))?;
        let trap = bare.line('T')?;
        let start = Instant::now();
        bare.client.call("DELETE", "/v1/memory/ram/poison", None)?;
        best.clear = best.clear.min(start.elapsed().as_nanos() as f64);
        let good = bare.line('G')?;
        best.trap = best.trap.min(trap as f64 / ticks);
        best.good = best.good.min(good as f64 / ticks);
    }
    let check = json!({ "class": "srar", "address": BASE + LENGTH });
    let offset = super::counters::tsc_offset(bare.pid())?;
    for _ in 0..ROUNDS {
        let start = counter().wrapping_add(offset);
        bare.client.call("POST", "/v1/vcpus/0/mce", Some(&check))?;
        let handled = bare.line('M')?;
        best.latency = best.latency.min(handled.wrapping_sub(start) as f64 / ticks);
    }
    Ok(best)
}

/// Lines that are added through the API: time and memory.
pub fn add(plan: &Plan, poisons: u64, layout: Layout) -> Result<Added> {
    let size = format!("--pmem=size={},id=p0", super::pmem::size(poisons, layout));
    let bare = Bare::start(plan, &[&size])?;
    let before = super::counters::memory(bare.pid(), 64 << 10)?.own;
    let Poisoned { said, time } = super::pmem::poison(&bare.socket, poisons, layout)?;
    let after = super::counters::memory(bare.pid(), 64 << 10)?.own;
    Ok(Added { said, time, memory: after.saturating_sub(before), maps: super::counters::maps(bare.pid())? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_an_elf_file_with_one_segment() {
        let image = image();
        assert!(image.starts_with(b"\x7fELF") && image.len() > 64 + 56);
        assert_eq!(image[24..32], BASE.to_le_bytes(), "the entry");
        assert_eq!(image[64..68], 1u32.to_le_bytes(), "PT_LOAD");
        assert!(image.len() as u64 - 120 < 0x4000, "the table of vectors is behind the program");
    }
}
