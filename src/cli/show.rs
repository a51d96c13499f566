//! Replies and events as people read them.
//!
//! A reply is taken as the JSON that it is, so that a field which this program does not know is shown too and not
//! lost: one `name: value` a line, lists of ranges and devices in short.

use std::fmt::Write;

use serde_json::{Map, Value};

use crate::command::{DeviceState, MemoryDevice, MemoryDimm, Record};
use crate::units::{ByteRange, Size};

/// Fields whose numbers are bytes.
const SIZES: [&str; 7] = ["size", "memory", "memory_poisoned", "poisoned", "granularity", "bytes", "length"];

/// Most items of a list on one line.
const MOST_SHOWN: usize = 64;

/// A reply as lines.
pub fn reply(body: &Value) -> String {
    let Some(object) = body.as_object() else { return format!("{body}\n") };
    if let Some(devices) = object.get("memory").and_then(Value::as_array) {
        return devices_table(devices);
    }
    let mut text = String::new();
    for (name, value) in object.iter().filter(|(name, _)| *name != "seq") {
        // A write to a String cannot fail.
        let _ = writeln!(text, "{}: {}", name.replace('_', " "), short(name, value));
    }
    if text.is_empty() { "done\n".to_owned() } else { text }
}

/// An event as one line: number, time since the start, name, fields.
pub fn event(record: &Record) -> String {
    let seconds = record.host_ns / 1_000_000_000;
    let micros = record.host_ns / 1000 % 1_000_000;
    let mut line = format!("{:>6} {seconds:>5}.{micros:06}", record.seq);
    let Ok(Value::Object(fields)) = serde_json::to_value(&record.event) else { return line };
    let name = fields.get("event").and_then(Value::as_str).unwrap_or_default();
    let _ = write!(line, " {name}");
    for (name, value) in fields.iter().filter(|(name, _)| *name != "event") {
        let value = match value {
            Value::String(text) if text.contains(' ') => format!("{text:?}"),
            // An access is of a few bytes; everything else follows the rules of replies.
            Value::Number(number) => number.to_string(),
            _ => short(name, value),
        };
        let _ = write!(line, " {name}={value}");
    }
    line
}

fn short(name: &str, value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Number(number) => match number.as_u64() {
            Some(bytes) if SIZES.contains(&name) => Size(bytes).to_string(),
            _ => number.to_string(),
        },
        Value::Array(list) if list.is_empty() => "none".to_owned(),
        Value::Array(list) => {
            let mut words: Vec<_> = list.iter().take(MOST_SHOWN).map(|value| short(name, value)).collect();
            if let Some(more) = list.len().checked_sub(MOST_SHOWN).filter(|more| *more > 0) {
                words.push(format!("and {more} more (--json shows all)"));
            }
            words.join(" ")
        }
        Value::Object(object) => match serde_json::from_value::<ByteRange>(value.clone()) {
            Ok(range) => range.to_string(),
            Err(_) => fields(object),
        },
        Value::Null => "none".to_owned(),
    }
}

fn fields(object: &Map<String, Value>) -> String {
    let parts = object.iter().map(|(name, value)| format!("{name}={}", short(name, value)));
    parts.collect::<Vec<_>>().join(", ")
}

/// A DIMM's name, or its handle.
fn dimm_name(dimm: &MemoryDimm) -> String {
    dimm.name.clone().unwrap_or_else(|| dimm.handle.to_string())
}

fn devices_table(devices: &[Value]) -> String {
    if devices.is_empty() {
        return "no memory devices\n".to_owned();
    }
    let mut rows = vec![
        ["ID", "STATE", "ADDRESS", "SIZE", "NODE", "BUS", "DIMMS", "CHANNEL", "POISONED", "STALE", "FILE"]
            .map(str::to_owned),
    ];
    for value in devices {
        let Ok(device) = serde_json::from_value::<MemoryDevice>(value.clone()) else { continue };
        let state = match device.state {
            DeviceState::Present if device.locked => "locked",
            state => state.name(),
        };
        let dimms: Vec<_> = device.dimms.iter().map(dimm_name).collect();
        let dimms = if dimms.is_empty() { "-".to_owned() } else { dimms.join("+") };
        rows.push([
            device.id,
            state.to_owned(),
            device.gpa.to_string(),
            Size(device.size).to_string(),
            device.node.to_string(),
            device.bus.unwrap_or_else(|| "-".to_owned()),
            dimms,
            device.channel.name().to_owned(),
            Size(device.poisoned).to_string(),
            device.stale_accesses.to_string(),
            device.file.unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    let mut widths = [0; 11];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}
