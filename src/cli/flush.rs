//! `aconite ctl flush`: flushes of virtio-pmem devices that do not go the straight way.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::api::percent_encode;
use crate::command::{FlushAction, FlushFault, FlushRelease};
use crate::units::TimeSpan;

/// What to do about flushes.
#[derive(Debug, Clone, Subcommand)]
pub enum Flush {
    /// The flushes that are held, and what is done to those to come
    Show {
        /// The device
        device: String,
    },
    /// Hold flushes to come until they are released; nothing is made durable for them before
    Hold {
        /// The device
        device: String,
        /// Which flushes.
        #[command(flatten)]
        which: Which,
    },
    /// Let flushes to come wait for a time
    Delay {
        /// The device
        device: String,
        /// How long, such as 500ms
        #[arg(value_name = "TIME")]
        time: TimeSpan,
        /// Which flushes.
        #[command(flatten)]
        which: Which,
    },
    /// Answer flushes to come with an error
    Fail {
        /// The device
        device: String,
        /// Which flushes.
        #[command(flatten)]
        which: Which,
    },
    /// Take faults away; what they hold stays held
    Disarm {
        /// The device
        device: String,
        /// Its number [default: all of them]
        fault: Option<u64>,
    },
    /// Let flushes go on that are held
    Release {
        /// The device
        device: String,
        /// Which, and how.
        #[command(flatten)]
        release: FlushRelease,
    },
}

/// Which flushes a fault takes.
#[derive(Debug, Clone, Copy, Args)]
pub struct Which {
    /// Let so many of them through first
    #[arg(long, value_name = "N", default_value_t = 0)]
    skip: u64,
    /// Then take so many, and no more [default: all]
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

impl Flush {
    /// Method, route and body of the request.
    pub fn request(&self) -> (&'static str, String, Option<Value>) {
        let path = |device: &str, rest: &str| format!("/v1/memory/{}/flushes{rest}", percent_encode(device));
        let fault = |device: &str, action, Which { skip, count }: Which| {
            ("POST", path(device, "/faults"), Some(json!(FlushFault { action, skip, count })))
        };
        match self {
            Self::Show { device } => ("GET", path(device, ""), None),
            Self::Hold { device, which } => fault(device, FlushAction::Hold, *which),
            Self::Delay { device, time, which } => fault(device, FlushAction::Delay { time: *time }, *which),
            Self::Fail { device, which } => fault(device, FlushAction::Fail, *which),
            Self::Disarm { device, fault } => {
                let number = fault.map(|number| format!("?fault={number}")).unwrap_or_default();
                ("DELETE", path(device, "/faults") + &number, None)
            }
            Self::Release { device, release } => ("POST", path(device, "/release"), Some(json!(release))),
        }
    }
}
