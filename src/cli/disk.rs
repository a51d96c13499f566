//! `aconite ctl disk`: requests of disks that do not go the straight way.

use clap::Subcommand;
use serde_json::{Value, json};

use crate::api::percent_encode;
use crate::command::{DiskAction, DiskFault, DiskOrder, DiskPattern, DiskRelease, DiskStatus, DiskTransfer};
use crate::units::TimeSpan;

/// What to do about disks.
#[derive(Debug, Clone, Subcommand)]
pub enum Disk {
    /// The disks, with their faults and the requests that are held
    List {
        /// Only this disk
        #[arg(value_name = "DISK")]
        disk: Option<String>,
    },
    /// Hold requests to come until they are released
    Hold {
        /// The disk
        disk: String,
        /// When the data of a request moves
        #[arg(long, value_enum, default_value = "release")]
        transfer: DiskTransfer,
        /// Which requests.
        #[command(flatten)]
        requests: DiskPattern,
    },
    /// Let requests to come wait for a time
    Delay {
        /// The disk
        disk: String,
        /// How long, such as 500ms
        #[arg(value_name = "TIME")]
        time: TimeSpan,
        /// When the data of a request moves
        #[arg(long, value_enum, default_value = "release")]
        transfer: DiskTransfer,
        /// Which requests.
        #[command(flatten)]
        requests: DiskPattern,
    },
    /// Let requests to come fail, with nothing transferred
    Fail {
        /// The disk
        disk: String,
        /// How they end
        #[arg(long, value_enum, default_value = "io-error")]
        status: DiskStatus,
        /// Which requests.
        #[command(flatten)]
        requests: DiskPattern,
    },
    /// Transfer only the first bytes of requests to come
    Tear {
        /// The disk
        disk: String,
        /// So many bytes
        bytes: u64,
        /// How they end
        #[arg(long, value_enum, default_value = "io-error")]
        status: DiskStatus,
        /// Which requests.
        #[command(flatten)]
        requests: DiskPattern,
    },
    /// Gather requests to come, and let them go on one after the other in another order
    Reorder {
        /// The disk
        disk: String,
        /// How many are gathered
        window: u32,
        /// In which order they go on
        #[arg(long, value_enum, default_value = "reverse")]
        order: DiskOrder,
        /// What a random order depends on
        #[arg(long, value_name = "N", default_value_t = 0)]
        seed: u64,
        /// How long the first one waits for the last
        #[arg(long, value_name = "TIME", default_value = "1s")]
        patience: TimeSpan,
        /// Which requests.
        #[command(flatten)]
        requests: DiskPattern,
    },
    /// Take faults away; what they hold stays held
    Disarm {
        /// The disk
        disk: String,
        /// Its number [default: all of them]
        fault: Option<u64>,
    },
    /// Let requests go on that are held
    Release {
        /// The disk
        disk: String,
        /// Which, and how.
        #[command(flatten)]
        release: DiskRelease,
    },
}

impl Disk {
    /// Method, route and body of the request.
    pub fn request(&self) -> (&'static str, String, Option<Value>) {
        let path = |disk: &str, rest: &str| format!("/v1/disks/{}{rest}", percent_encode(disk));
        let fault = |disk: &str, action, requests: &DiskPattern| {
            ("POST", path(disk, "/faults"), Some(json!(DiskFault { action, requests: *requests })))
        };
        match self {
            Self::List { disk: None } => ("GET", "/v1/disks".to_owned(), None),
            Self::List { disk: Some(disk) } => ("GET", path(disk, ""), None),
            Self::Hold { disk, transfer, requests } => {
                fault(disk, DiskAction::Hold { transfer: *transfer }, requests)
            }
            Self::Delay { disk, time, transfer, requests } => {
                fault(disk, DiskAction::Delay { time: *time, transfer: *transfer }, requests)
            }
            Self::Fail { disk, status, requests } => {
                fault(disk, DiskAction::Fail { status: *status }, requests)
            }
            Self::Tear { disk, bytes, status, requests } => {
                fault(disk, DiskAction::Tear { bytes: *bytes, status: *status }, requests)
            }
            Self::Reorder { disk, window, order, seed, patience, requests } => fault(
                disk,
                DiskAction::Reorder { window: *window, order: *order, seed: *seed, patience: *patience },
                requests,
            ),
            Self::Disarm { disk, fault } => {
                let number = fault.map(|number| format!("?fault={number}")).unwrap_or_default();
                ("DELETE", path(disk, "/faults") + &number, None)
            }
            Self::Release { disk, release } => ("POST", path(disk, "/release"), Some(json!(release))),
        }
    }
}
