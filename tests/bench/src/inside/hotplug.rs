//! A device that goes and comes again: from the request until the guest has let go of it, and until it can be used.

use super::guest::Guest;
use super::monitor::{Monitor, Place, Start};
use super::qmp::Qmp;
use crate::plan::{Contestant, Cycles, Plan, Way};
use aconite::api::Client;
use aconite::command::{Event, RemovalStep};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// Cycles of a guest. The first one, in which the guest's code is cold, does not count.
const COUNT: usize = 8;
/// The same where `pciehp` waits five seconds for a second push of the button.
const PORT_COUNT: usize = 3;
/// Bytes of what goes and comes: a block of the kernel's memory hot-plug.
const SIZE: u64 = 128 << 20;
/// A removal that QEMU is asked for right after an insertion was seen to get lost: the guest hears of the insertion once
/// more, and never of the removal.
const SETTLE: Duration = Duration::from_millis(500);
/// How long a guest may take for one way.
const PATIENCE: &str = "60s";
const LIMIT: Duration = Duration::from_secs(60);
/// How often QEMU is asked whether a guest has started a device.
const LOOK: Duration = Duration::from_millis(4);

/// Measures cycles.
pub fn measure(plan: &Plan, way: Way) -> Result<Cycles> {
    let socket = plan.dir.join("hotplug.sock");
    match way {
        Way::Dimm => qemu(plan, &socket, &DIMM),
        Way::Card => qemu(plan, &socket, &CARD),
        Way::AcpiCard => qemu(plan, &socket, &Peer { place: Place::AcpiPort, count: COUNT, ..CARD }),
        Way::Container => aconite(plan, &socket, "eject", "container"),
        Way::Surprise => aconite(plan, &socket, "surprise", "container"),
        Way::Agent => aconite(plan, &socket, "eject", "agent"),
        Way::Port => aconite(plan, &socket, "eject", "pcie"),
        Way::Bridge => aconite(plan, &socket, "eject", "bridge"),
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

/// What comes and goes in QEMU.
struct Peer {
    place: Place,
    count: usize,
    /// Makes it, and waits until the guest has it.
    plug: fn(&mut Qmp) -> Result<()>,
    /// What is left of it when the device has gone.
    forget: fn(&mut Qmp) -> Result<()>,
}

/// Memory on a slot, which nobody has taken into use. The guest says by _OST that it has it, and by _EJ0 that it has let
/// go of it (docs/specs/acpi_mem_hotplug.rst).
const DIMM: Peer = Peer {
    place: Place::Memory,
    count: COUNT,
    plug: |qmp| {
        let memory = json!({ "qom-type": "memory-backend-ram", "id": "m0", "size": SIZE });
        qmp.execute("object-add", &memory)?;
        qmp.execute("device_add", &json!({ "driver": "pc-dimm", "id": "d0", "memdev": "m0" }))?;
        let said = qmp.event("ACPI_DEVICE_OST").context("the guest does not take the memory")?;
        ensure!(said["data"]["info"]["status"] == 0, "the guest does not take the memory: {said}");
        Ok(())
    },
    forget: |qmp| qmp.execute("object-del", &json!({ "id": "m0" })).map(drop),
};

/// A virtio device behind a port whose driver stock kernels have built in. The guest has it when that has started it.
const CARD: Peer = Peer {
    place: Place::Port,
    count: PORT_COUNT,
    plug: |qmp| {
        let device = json!({ "driver": "virtio-serial-pci", "id": "d0", "bus": "rp0" });
        qmp.execute("device_add", &device)?;
        let path = json!({ "path": "/machine/peripheral/d0/virtio-backend" });
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            let state = qmp.execute("x-query-virtio-status", &path)?;
            if state["status"].to_string().contains("VIRTIO_CONFIG_S_DRIVER_OK") {
                return Ok(());
            }
            thread::sleep(LOOK);
        }
        bail!("the guest does not start the device")
    },
    forget: |_| Ok(()),
};

fn qemu(plan: &Plan, socket: &Path, peer: &Peer) -> Result<Cycles> {
    let _ = std::fs::remove_file(socket);
    let start = Start { place: Some(peer.place), socket: Some(socket), ..Start::quiet(Contestant::Q35) };
    let mut monitor = Monitor::start(plan, &start)?;
    monitor.wait_for_init()?;
    let mut qmp = Qmp::connect(socket)?;
    let (mut unplug, mut plug) = (Vec::new(), Vec::new());
    for _ in 0..peer.count {
        let begin = Instant::now();
        (peer.plug)(&mut qmp)?;
        plug.push(since(begin));
        thread::sleep(SETTLE);
        let begin = Instant::now();
        qmp.execute("device_del", &json!({ "id": "d0" }))?;
        // One for the device, by its name, and perhaps others for its parts.
        while qmp.event("DEVICE_DELETED").context("the guest does not let go")?["data"]["device"] != "d0" {}
        (peer.forget)(&mut qmp)?;
        unplug.push(since(begin));
    }
    Ok(Cycles { unplug: middle(unplug), plug: middle(plug), own: None })
}

/// A memory device that goes in this mode over this channel, as the API names them.
fn aconite(plan: &Plan, socket: &Path, mode: &str, via: &str) -> Result<Cycles> {
    let mut device = json!({ "size": SIZE.to_string(), "id": "p0" });
    let mut option = format!("--pmem=size={SIZE},id=p0");
    let port = via == "pcie";
    if port || via == "bridge" {
        device["via"] = json!("virtio");
        device["channel"] = json!(via);
        option.push_str(&format!(",via=virtio,channel={via}"));
    }
    let (mut guest, _) = Guest::start(plan, socket, &[&option], "plug")?;
    let client = Client::new(socket);
    let (mut unplug, mut plug, mut own) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..if port { PORT_COUNT } else { COUNT } {
        let before = client.call("GET", "/v1/machine", None)?.body["seq"].as_u64().context("no number")?;
        let begin = Instant::now();
        if (mode, via) == ("eject", "container") {
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
        own.push(own_time(&client, before, port)?);
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
/// device is gone, and from when the next one takes its place until it is within reach. A device behind a port is gone
/// with the slot's power, and then the guest is waited for until it releases the slot.
fn own_time(client: &Client, since: u64, port: bool) -> Result<u64> {
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
    let gone = (Some(RemovalStep::Ejected), Some(RemovalStep::Departed));
    let spans = [
        Some((Some(RemovalStep::Requested), Some(RemovalStep::Notified))),
        (!port).then_some(gone),
        Some((Some(RemovalStep::Replaced), None)),
    ];
    // A surprise has no ejection.
    Ok(spans.into_iter().flatten().filter_map(|(from, to)| at(to)?.checked_sub(at(from)?)).sum())
}
