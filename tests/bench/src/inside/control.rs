//! Round trips on the control socket of a machine whose guest is idle.

use super::monitor::{Monitor, Start};
use super::qmp::Qmp;
use crate::plan::{Contestant, Control, Plan};
use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

const ROUNDS: u32 = 300;
const TIMEOUT: Duration = Duration::from_secs(10);
const STATUS: &str = "GET /v1/machine HTTP/1.1\r\nHost: localhost\r\n\r\n";
const STATUS_ONCE: &str = "GET /v1/machine HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

/// Boots a machine and asks it for its state again and again.
pub fn measure(plan: &Plan, contestant: Contestant) -> Result<Control> {
    let socket = plan.dir.join("control.sock");
    let _ = std::fs::remove_file(&socket);
    let start = Start { socket: Some(&socket), ..Start::quiet(contestant) };
    let mut monitor = Monitor::start(plan, &start)?;
    monitor.wait_for_init()?;
    // The guest's last work of its start.
    std::thread::sleep(Duration::from_millis(500));
    let floor = super::floors::socket_pair()?;
    let (kept, connected) = match contestant {
        Contestant::Aconite => (http_kept(&socket)?, Some(best(|| http_once(&socket))?)),
        _ => (qmp(&socket)?, None),
    };
    Ok(Control { kept, connected, floor })
}

fn best(mut once: impl FnMut() -> Result<()>) -> Result<u64> {
    let mut best = u64::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        once()?;
        best = best.min(start.elapsed().as_nanos() as u64);
    }
    Ok(best)
}

fn connect(socket: &Path) -> Result<UnixStream> {
    let stream =
        UnixStream::connect(socket).with_context(|| format!("Cannot connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

fn http_kept(socket: &Path) -> Result<u64> {
    let mut stream = connect(socket)?;
    best(|| {
        stream.write_all(STATUS.as_bytes())?;
        http_reply(&mut stream)
    })
}

fn http_once(socket: &Path) -> Result<()> {
    let mut stream = connect(socket)?;
    stream.write_all(STATUS_ONCE.as_bytes())?;
    http_reply(&mut stream)
}

/// Reads a reply with a length.
fn http_reply(stream: &mut UnixStream) -> Result<()> {
    let mut bytes = Vec::with_capacity(2048);
    let mut buffer = [0; 4096];
    loop {
        let count = stream.read(&mut buffer)?;
        bytes.extend_from_slice(&buffer[..count]);
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            if !head.starts_with("HTTP/1.1 200 ") {
                bail!("The machine refused: {text}");
            }
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
            });
            if body.len() >= length.context("A reply without a length")? {
                return Ok(());
            }
        }
        if count == 0 {
            bail!("The machine closed the connection");
        }
    }
}

fn qmp(socket: &Path) -> Result<u64> {
    let mut qmp = Qmp::connect(socket)?;
    best(|| qmp.exchange("{\"execute\":\"query-status\"}\n").map(drop))
}
