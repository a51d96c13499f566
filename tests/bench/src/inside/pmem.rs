//! A memory device read beside RAM, with poisoned lines elsewhere in it.

use super::counters;
use super::guest::Guest;
use crate::plan::{Clean, Cold, Layout, Plan, Pmem, Reading};
use aconite::api::Client;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
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
    let (mut guest, _) = start(plan, &socket, 1)?;
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
    pmem.maps = counters::maps(guest.pid())?;
    pmem.sequential = reading(&mut guest, "sequential")?;
    pmem.random = reading(&mut guest, "random")?;
    Ok(pmem)
}

/// Clean lines of a page whose last line is poisoned, in a guest with this many processors.
pub fn clean(plan: &Plan, cpus: u32) -> Result<Clean> {
    let socket = plan.dir.join("pmem.sock");
    let (mut guest, first) = start(plan, &socket, cpus)?;
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
    let range = json!({ "ranges": [{ "offset": first + page + PAGE - LINE, "length": LINE }] });
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

/// A guest that reads its RAM and a device, and where the bytes that it maps begin in the device: what is before them
/// describes the namespace.
fn start(plan: &Plan, socket: &Path, cpus: u32) -> Result<(Guest, u64)> {
    let options = ["--pmem=size=1G,id=p0", "--tool=ndctl", &format!("--cpus={cpus}")];
    let (guest, mapped) = Guest::start(plan, socket, &options, "pmem")?;
    Ok((guest, DEVICE.checked_sub(mapped).context("The guest maps more than there is")?))
}

/// Asks; returns nanoseconds and exits.
fn read(guest: &mut Guest, what: &str, order: &str) -> Result<(u64, u64)> {
    let before = guest.counters(&["exits"])?;
    let time = guest.ask(&format!("read {what} {order}"))?;
    Ok((time, guest.counters(&["exits"])? - before))
}

fn reading(guest: &mut Guest, order: &str) -> Result<Reading> {
    // The first reading of each touches what is not mapped yet.
    read(guest, "ram", order)?;
    read(guest, "dax", order)?;
    let mut best = Reading { ram: u64::MAX, device: u64::MAX, ram_exits: u64::MAX, device_exits: u64::MAX };
    for _ in 0..ROUNDS {
        let (time, exits) = read(guest, "ram", order)?;
        (best.ram, best.ram_exits) = (best.ram.min(time), best.ram_exits.min(exits));
        let (time, exits) = read(guest, "dax", order)?;
        (best.device, best.device_exits) = (best.device.min(time), best.device_exits.min(exits));
    }
    if best.ram == 0 || best.device == 0 {
        bail!("A reading took no time");
    }
    Ok(best)
}
