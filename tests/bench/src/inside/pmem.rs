//! A memory device read beside RAM, with poisoned lines elsewhere in it.

use super::counters;
use crate::plan::{Clean, Cold, Layout, Plan, Pmem, Reading};
use aconite::api::Client;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

const ROUNDS: usize = 3;
const LINE: u64 = 64;
const PAGE: u64 = 4096;
/// Bytes of the device.
const DEVICE: u64 = 1 << 30;
/// Loads of a clean line that are timed together, and copies up to a poisoned one.
const LOADS: u64 = 200;
const COPIES: u64 = 50;
/// Poison begins here; what is read lies far below.
const POISON_START: u64 = 512 << 20;

/// Measures with `poisons` lines poisoned.
pub fn measure(plan: &Plan, poisons: u64, layout: Layout) -> Result<Pmem> {
    let socket = plan.dir.join("pmem.sock");
    let _ = std::fs::remove_file(&socket);
    let mut guest = Guest::start(plan, &socket, 1)?;
    let mut pmem = Pmem::default();
    if poisons == 0 {
        let before = guest.counters(&["pf_taken"])?;
        let bytes = guest.ask("touch")?;
        let faults = guest.counters(&["pf_taken"])? - before;
        pmem.cold = Cold { bytes, faults, pages_2m: guest.counters(&["pages_2m"])? };
    } else {
        let Poisoned { said, time } = poison(&socket, poisons, layout)?;
        (pmem.poison, pmem.poison_time) = (Some(said), time);
    }
    pmem.maps = counters::maps(guest.child.id())?;
    pmem.sequential = guest.reading("sequential")?;
    pmem.random = guest.reading("random")?;
    Ok(pmem)
}

/// Clean lines of a page whose last line is poisoned, in a guest with this many processors.
pub fn clean(plan: &Plan, cpus: u32) -> Result<Clean> {
    let socket = plan.dir.join("pmem.sock");
    let _ = std::fs::remove_file(&socket);
    let mut guest = Guest::start(plan, &socket, cpus)?;
    let page = POISON_START;
    let load = |guest: &mut Guest, page: u64| -> Result<f64> {
        let mut best = u64::MAX;
        for _ in 0..ROUNDS {
            best = best.min(guest.ask(&format!("load {page} {LOADS}"))?);
        }
        Ok(best as f64 / LOADS as f64)
    };
    load(&mut guest, page)?;
    let plain = load(&mut guest, page)?;
    let range = json!({ "ranges": [{ "offset": guest.start + page + PAGE - LINE, "length": LINE }] });
    Client::new(&socket).call("POST", "/v1/memory/p0/poison", Some(&range))?;
    let guarded = load(&mut guest, page)?;
    let (mut copy, mut copy_exits) = (u64::MAX, f64::MAX);
    for _ in 0..ROUNDS {
        // The exits of the request itself are those of one with fewer copies.
        let mut exits = [0; 2];
        for (exits, count) in exits.iter_mut().zip([COPIES, 0]) {
            let before = guest.counters(&["exits"])?;
            let time = guest.ask(&format!("copy {page} {} {count}", PAGE - LINE))?;
            *exits = guest.counters(&["exits"])? - before;
            if count == COPIES {
                copy = copy.min(time);
            }
        }
        copy_exits = copy_exits.min(exits[0].saturating_sub(exits[1]) as f64 / COPIES as f64);
    }
    Ok(Clean { load: guarded, plain, copy: copy as f64 / COPIES as f64, copy_exits })
}

/// Bytes from one poisoned line to the next.
fn stride(layout: Layout) -> u64 {
    match layout {
        Layout::Packed => LINE,
        Layout::Paged => PAGE,
        Layout::Scattered => 2 << 20,
    }
}

/// The size of a device that has room for so many lines, as an option has it.
pub fn size(poisons: u64, layout: Layout) -> String {
    let bytes = POISON_START + poisons * stride(layout);
    format!("{}M", bytes.next_multiple_of(1 << 30) >> 20)
}

/// What a machine made of a request for poison.
#[derive(Debug)]
pub struct Poisoned {
    /// In words. A limit that it names is a result, not a failure.
    pub said: String,
    /// Nanoseconds from the connection to the end of the reply.
    pub time: u64,
}

/// Poisons in one request. The client is no part of what is measured: it has the text of the request ready, and counts
/// the bytes of the reply.
pub fn poison(socket: &Path, poisons: u64, layout: Layout) -> Result<Poisoned> {
    let range = |offset: u64, length: u64| json!({ "offset": offset, "length": length });
    let ranges: Vec<Value> = match layout {
        Layout::Packed => vec![range(POISON_START, poisons * LINE)],
        _ => (0..poisons).map(|n| range(POISON_START + n * stride(layout), LINE)).collect(),
    };
    let body = json!({ "ranges": ranges }).to_string();
    let request = format!(
        "POST /v1/memory/p0/poison HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let start = Instant::now();
    let mut stream = UnixStream::connect(socket).context("No machine answers")?;
    stream.write_all(request.as_bytes()).context("The machine does not read the request")?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).context("The machine does not answer")?;
    let time = start.elapsed().as_nanos() as u64;
    if reply.starts_with(b"HTTP/1.1 200 ") {
        return Ok(Poisoned { said: format!("{} ranges", ranges.len()), time });
    }
    let reply = String::from_utf8_lossy(&reply);
    match reply.split_once("\r\n\r\n").and_then(|(_, body)| serde_json::from_str::<Value>(body).ok()) {
        Some(body) => Ok(Poisoned { said: body["error"].to_string(), time }),
        None => bail!("The machine answers {reply:?}"),
    }
}

/// A machine with the worker in its guest.
struct Guest {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Where the bytes that the guest maps begin in the device: what is before them describes the namespace.
    start: u64,
}

impl Guest {
    fn start(plan: &Plan, socket: &Path, cpus: u32) -> Result<Self> {
        let errors = plan.dir.join("errors");
        let mut command = Command::new(plan.dir.join("aconite"));
        command.args(["run", "--host=kvm", "--memory=768M", "--pmem=size=1G,id=p0", "--tool=ndctl"]);
        command.arg("--kernel").arg(plan.dir.join("vmlinux")).arg("--modules").arg(&plan.modules);
        command.arg("--api-socket").arg(socket).arg(format!("--cpus={cpus}"));
        command.arg("--").arg(plan.dir.join("guest")).arg("pmem");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&errors)?);
        let mut child = command.spawn().context("Cannot start aconite")?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let mut guest = Guest {
            child,
            input: input.context("No standard input")?,
            output: BufReader::new(output.context("No standard output")?),
            start: 0,
        };
        let mapped =
            guest.number("ready").with_context(|| std::fs::read_to_string(&errors).unwrap_or_default())?;
        guest.start = DEVICE.checked_sub(mapped).context("The guest maps more than there is")?;
        Ok(guest)
    }

    /// The number in the guest's next line, which starts with `word`.
    fn number(&mut self, word: &str) -> Result<u64> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        let number = line.trim().strip_prefix(word).and_then(|rest| rest.trim().parse().ok());
        number.with_context(|| format!("The guest says {line:?}"))
    }

    fn ask(&mut self, request: &str) -> Result<u64> {
        writeln!(self.input, "{request}")?;
        self.number("")
    }

    /// The sum of these counters.
    fn counters(&self, names: &[&str]) -> Result<u64> {
        let counters = counters::of_machine(self.child.id())?;
        Ok(names.iter().filter_map(|name| counters.get(*name)).sum())
    }

    /// Asks; returns nanoseconds and exits.
    fn read(&mut self, what: &str, order: &str) -> Result<(u64, u64)> {
        let before = self.counters(&["exits"])?;
        let time = self.ask(&format!("read {what} {order}"))?;
        Ok((time, self.counters(&["exits"])? - before))
    }

    fn reading(&mut self, order: &str) -> Result<Reading> {
        // The first reading of each touches what is not mapped yet.
        self.read("ram", order)?;
        self.read("dax", order)?;
        let mut best =
            Reading { ram: u64::MAX, device: u64::MAX, ram_exits: u64::MAX, device_exits: u64::MAX };
        for _ in 0..ROUNDS {
            let (time, exits) = self.read("ram", order)?;
            (best.ram, best.ram_exits) = (best.ram.min(time), best.ram_exits.min(exits));
            let (time, exits) = self.read("dax", order)?;
            (best.device, best.device_exits) = (best.device.min(time), best.device_exits.min(exits));
        }
        if best.ram == 0 || best.device == 0 {
            bail!("A reading took no time");
        }
        Ok(best)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
