//! A device that goes and comes again: from the request until the guest has let go of it, and until it can be used.

use super::guest::Guest;
use super::monitor::{Monitor, Start};
use super::qmp::Qmp;
use crate::plan::{Console, Contestant, Cycles, Image, Plan, Way};
use aconite::api::Client;
use aconite::command::{Event, RemovalStep};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// Cycles of a guest. The first one, in which the guest's code is cold, does not count.
const COUNT: usize = 8;
/// The same where `pciehp` waits five seconds for a second push of the button.
const PORT_COUNT: usize = 3;
/// Bytes of what goes and comes: a block of the kernel's memory hot-plug.
const SIZE: &str = "128M";
/// A removal that QEMU is asked for right after an insertion was seen to get lost: the guest hears of the insertion once
/// more, and never of the removal.
const SETTLE: Duration = Duration::from_millis(500);
/// How long a guest may take for one way.
const PATIENCE: &str = "60s";

/// Measures cycles.
pub fn measure(plan: &Plan, way: Way) -> Result<Cycles> {
    let socket = plan.dir.join("hotplug.sock");
    match way {
        Way::Dimm => dimm(plan, &socket),
        _ => aconite(plan, &socket, way),
    }
}

/// The middle one of the cycles that count.
fn middle(mut times: Vec<u64>) -> u64 {
    times.remove(0);
    times.sort_unstable();
    times[times.len() / 2]
}

fn since(start: Instant) -> u64 {
    start.elapsed().as_nanos() as u64
}

/// QEMU's memory on a slot, which nobody has taken into use. The guest says by _OST that it has it, and by _EJ0 that it
/// has let go of it (docs/specs/acpi_mem_hotplug.rst).
fn dimm(plan: &Plan, socket: &Path) -> Result<Cycles> {
    let _ = std::fs::remove_file(socket);
    let start = Start {
        contestant: Contestant::Q35,
        image: Image::Vmlinux,
        console: Console::Quiet,
        pmem: false,
        slot: true,
        disk: None,
        socket: Some(socket),
    };
    let mut monitor = Monitor::start(plan, &start)?;
    monitor.wait_for_init()?;
    let mut qmp = Qmp::connect(socket)?;
    let (mut unplug, mut plug) = (Vec::new(), Vec::new());
    for _ in 0..COUNT {
        let begin = Instant::now();
        let memory = json!({ "qom-type": "memory-backend-ram", "id": "m0", "size": 128 << 20 });
        qmp.execute("object-add", &memory)?;
        qmp.execute("device_add", &json!({ "driver": "pc-dimm", "id": "d0", "memdev": "m0" }))?;
        let said = qmp.event("ACPI_DEVICE_OST").context("the guest does not take the memory")?;
        ensure!(said["data"]["info"]["status"] == 0, "the guest does not take the memory: {said}");
        plug.push(since(begin));
        thread::sleep(SETTLE);
        let begin = Instant::now();
        qmp.execute("device_del", &json!({ "id": "d0" }))?;
        qmp.event("DEVICE_DELETED").context("the guest does not let go of the memory")?;
        qmp.execute("object-del", &json!({ "id": "m0" }))?;
        unplug.push(since(begin));
    }
    Ok(Cycles { unplug: middle(unplug), plug: middle(plug), own: None })
}

fn aconite(plan: &Plan, socket: &Path, way: Way) -> Result<Cycles> {
    let mut device = json!({ "size": SIZE, "id": "p0" });
    let mut option = format!("--pmem=size={SIZE},id=p0");
    if way == Way::Port {
        device["via"] = json!("virtio");
        option.push_str(",via=virtio");
    }
    let (mode, via) = match way {
        Way::Surprise => ("surprise", "container"),
        Way::Agent => ("eject", "agent"),
        Way::Port => ("eject", "pcie"),
        Way::Container | Way::Dimm => ("eject", "container"),
    };
    let (mut guest, _) = Guest::start(plan, socket, &[&option], "plug")?;
    let client = Client::new(socket);
    let (mut unplug, mut plug, mut own) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..if way == Way::Port { PORT_COUNT } else { COUNT } {
        let before = client.call("GET", "/v1/machine", None)?.body["seq"].as_u64().context("no number")?;
        let begin = Instant::now();
        if way == Way::Container {
            guest.ask("offline")?;
        }
        let target = format!("/v1/devices/p0?mode={mode}&via={via}&timeout={PATIENCE}");
        carry_out(&client, "DELETE", &target, None)?;
        unplug.push(since(begin));
        guest.ask("gone")?;
        let begin = Instant::now();
        carry_out(&client, "POST", "/v1/memory", Some(&device))?;
        guest.ask("there")?;
        plug.push(since(begin));
        own.push(own_time(&client, before)?);
    }
    Ok(Cycles { unplug: middle(unplug), plug: middle(plug), own: Some(middle(own)) })
}

/// Sends a request, and waits for the end of its operation.
fn carry_out(client: &Client, method: &str, target: &str, body: Option<&Value>) -> Result<()> {
    let number = client.call(method, target, body)?.body["operation"].clone();
    let ended = client.call("GET", &format!("/v1/operations/{number}?wait={PATIENCE}"), None)?.body;
    ensure!(ended["state"] == "done", "{method} {target}: {ended}");
    Ok(())
}

/// Nanoseconds of a cycle in which the guest was not waited for: until it was told, from when it has let go until the
/// device is gone, and from when the next one takes its place until it is within reach.
fn own_time(client: &Client, since: u64) -> Result<u64> {
    let mut steps: Vec<(Option<RemovalStep>, u64)> = Vec::new();
    for record in client.events(since, false)? {
        let record = record?;
        match record.event {
            Event::Removal { step, .. } => steps.push((Some(step), record.host_ns)),
            Event::Inserted { .. } => steps.push((None, record.host_ns)),
            _ => {}
        }
    }
    let at = |step| steps.iter().find(|(found, _)| *found == step).map(|(_, at)| *at);
    let spans = [
        (Some(RemovalStep::Requested), Some(RemovalStep::Notified)),
        (Some(RemovalStep::Ejected), Some(RemovalStep::Departed)),
        (Some(RemovalStep::Replaced), None),
    ];
    // A surprise has no ejection.
    Ok(spans.into_iter().filter_map(|(from, to)| at(to)?.checked_sub(at(from)?)).sum())
}
