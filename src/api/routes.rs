//! The one table of what can be asked.
//!
//! A route says how a request is written and what it is answered with; its handler turns the request into an
//! [`Action`] and looks at nothing else. The OpenAPI document is made from the same rows.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::request::{Input, wrong_value};
use crate::command::{
    Census, Command, CperAccepted, CperRequest, DiskArmed, DiskCommand, DiskDisarmed, DiskFault, DiskInfo,
    DiskList, DiskRelease, DiskReleased, Error, ErrorCode, FirmwareChange, FirmwareFault, FirmwareState,
    FlushChange, FlushFault, FlushRelease, FlushState, MachineInfo, MceQueued, MceRequest, MemoryDevice,
    NotifyKind, Operation, PoisonAdded, PoisonCleared, PoisonPattern, PoisonPlace, PoisonPlaced,
    PoisonPolicy, PoisonState, PolicyChange, PowerCut, PowerLoss, Record, RemoveMode, StaleChange,
    StaleState,
};
use crate::config::{Channel, Disk, DiskKeys, Pmem, PmemKeys, validate_insert};
use crate::units::{Address, TimeSpan};

/// What is to be done for a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Ask the machine.
    Execute(Command),
    /// Ask for an operation, again when it has ended, for at most this long.
    Wait {
        /// The operation.
        operation: u64,
        /// How long.
        patience: TimeSpan,
    },
    /// Stream events.
    Stream {
        /// Number of the last event that the client knows.
        since: u64,
        /// Whether the stream goes on when there are no more.
        follow: bool,
    },
    /// Answer with the OpenAPI document.
    Document,
}

/// A parameter of a query.
#[derive(Debug, Clone, Copy)]
pub struct Parameter {
    /// Its name.
    pub name: &'static str,
    /// What it means.
    pub summary: &'static str,
    /// Whether it has to be given.
    pub required: bool,
    /// Whether it can be given more than once.
    pub repeated: bool,
    /// What it looks like.
    pub schema: fn(&mut SchemaGenerator) -> Schema,
}

/// What a route is answered with.
#[derive(Debug, Clone, Copy)]
pub enum ReplyKind {
    /// A JSON object of this shape, with `seq` in it.
    Object(fn(&mut SchemaGenerator) -> Schema),
    /// JSON objects of this shape, one a line.
    Lines(fn(&mut SchemaGenerator) -> Schema),
    /// The OpenAPI document.
    Document,
}

/// One thing that can be asked.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// `GET`, `POST` or `DELETE`.
    pub method: &'static str,
    /// The path; a part in braces stands for anything.
    pub path: &'static str,
    /// Its name in generated clients.
    pub name: &'static str,
    /// What it does.
    pub summary: &'static str,
    /// The parameters of its query.
    pub query: &'static [Parameter],
    /// The shape of its body, if it takes one.
    pub request: Option<fn(&mut SchemaGenerator) -> Schema>,
    /// The status of a good reply.
    pub status: u16,
    /// What it is answered with.
    pub reply: ReplyKind,
    /// The errors of its own, besides [`COMMON_ERRORS`].
    pub errors: &'static [ErrorCode],
    pub(super) handler: fn(&Input<'_>) -> Result<Action, Error>,
}

/// Errors that any request can be answered with.
pub const COMMON_ERRORS: &[ErrorCode] = &[
    ErrorCode::BadHttp,
    ErrorCode::BadParameter,
    ErrorCode::LengthRequired,
    ErrorCode::BodyTooLarge,
    ErrorCode::HeadTooLarge,
    ErrorCode::RequestTimeout,
    ErrorCode::TooManyConnections,
    ErrorCode::MachineGone,
    ErrorCode::Internal,
];

/// Ranges that a list of poison has if nothing is said.
const DEFAULT_LISTED: usize = 10_000;
/// Most ranges that it can have.
const MOST_LISTED: usize = 100_000;

fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

fn firmware(input: &Input<'_>, change: FirmwareChange) -> Result<Action, Error> {
    Ok(Action::Execute(Command::Firmware { device: input.id(), change }))
}

fn flush(input: &Input<'_>, change: FlushChange) -> Result<Action, Error> {
    Ok(Action::Execute(Command::Flush { device: input.id(), change }))
}

const FLUSH_ERRORS: &[ErrorCode] =
    &[ErrorCode::BadJson, ErrorCode::NoSuchDevice, ErrorCode::NotSupported, ErrorCode::WrongDeviceState];

/// The fault that is to be taken away.
const FAULT: Parameter = Parameter {
    name: "fault",
    summary: "Its number. Default: all of them",
    required: false,
    repeated: false,
    schema: of::<u64>,
};

fn fault_number(input: &Input<'_>) -> Result<Option<u64>, Error> {
    let number = |text: &str| {
        text.parse()
            .map_err(|_| wrong_value("fault", format_args!("{text:?} is no number: give that of a fault")))
    };
    input.text("fault").map(number).transpose()
}

/// The memory devices of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryList {
    /// The devices, departed ones too.
    pub memory: Vec<MemoryDevice>,
}

/// An answer without content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Done {}

/// A request to send the guest a notification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NotifyRequest {
    /// What it says.
    pub kind: NotifyKind,
}

/// What can be asked, in the order of the documentation.
pub const ROUTES: &[Route] = &[
    Route {
        method: "GET",
        path: "/v1/machine",
        name: "machine_info",
        summary: "About the machine",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<MachineInfo>),
        errors: &[],
        handler: |_| Ok(Action::Execute(Command::MachineInfo)),
    },
    Route {
        method: "GET",
        path: "/v1/memory",
        name: "memory_list",
        summary: "All memory devices",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<MemoryList>),
        errors: &[],
        handler: |_| Ok(Action::Execute(Command::ListMemory)),
    },
    Route {
        method: "POST",
        path: "/v1/memory",
        name: "memory_insert",
        summary: "Put a memory device into a free slot",
        query: &[],
        request: Some(of::<Pmem>),
        status: 202,
        reply: ReplyKind::Object(of::<Operation>),
        errors: &[
            ErrorCode::BadJson,
            ErrorCode::InvalidConfig,
            ErrorCode::IdInUse,
            ErrorCode::NoFreeSlot,
            ErrorCode::AddressInUse,
            ErrorCode::NoSuchDevice,
            ErrorCode::WrongState,
            ErrorCode::WrongDeviceState,
            ErrorCode::FileInUse,
            ErrorCode::HostLimit,
        ],
        handler: |input| {
            let pmem = Pmem::try_from(input.body::<PmemKeys>()?)?;
            validate_insert(&pmem, &[])?;
            Ok(Action::Execute(Command::Insert { pmem: Box::new(pmem) }))
        },
    },
    Route {
        method: "GET",
        path: "/v1/memory/{id}",
        name: "memory_show",
        summary: "One memory device",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<MemoryDevice>),
        errors: &[ErrorCode::NoSuchDevice],
        handler: |input| Ok(Action::Execute(Command::ShowMemory { device: input.id() })),
    },
    Route {
        method: "GET",
        path: "/v1/memory/{id}/stale",
        name: "stale",
        summary: "What a processor gets that touches a device that has departed",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<StaleState>),
        errors: &[ErrorCode::NoSuchDevice],
        handler: |input| Ok(Action::Execute(Command::Stale { device: input.id(), answer: None })),
    },
    Route {
        method: "PATCH",
        path: "/v1/memory/{id}/stale",
        name: "stale_change",
        summary: "Change what a processor gets that touches a device that has departed",
        query: &[],
        request: Some(of::<StaleChange>),
        status: 200,
        reply: ReplyKind::Object(of::<StaleState>),
        errors: &[ErrorCode::BadJson, ErrorCode::NoSuchDevice],
        handler: |input| {
            let StaleChange { answer } = input.body()?;
            Ok(Action::Execute(Command::Stale { device: input.id(), answer: Some(answer) }))
        },
    },
    Route {
        method: "GET",
        path: "/v1/memory/{id}/firmware",
        name: "firmware",
        summary: "The faults of a device's firmware, and what they have met",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<FirmwareState>),
        errors: &[ErrorCode::NoSuchDevice, ErrorCode::WrongState, ErrorCode::WrongDeviceState],
        handler: |input| firmware(input, FirmwareChange::Show),
    },
    Route {
        method: "POST",
        path: "/v1/memory/{id}/firmware",
        name: "firmware_fail",
        summary: "Make a device's firmware fail calls of the guest, or answer them late or wrong",
        query: &[],
        request: Some(of::<FirmwareFault>),
        status: 200,
        reply: ReplyKind::Object(of::<FirmwareState>),
        errors: &[
            ErrorCode::BadJson,
            ErrorCode::InvalidConfig,
            ErrorCode::NoSuchDevice,
            ErrorCode::WrongState,
            ErrorCode::WrongDeviceState,
        ],
        handler: |input| firmware(input, FirmwareChange::Plan(input.body()?)),
    },
    Route {
        method: "DELETE",
        path: "/v1/memory/{id}/firmware",
        name: "firmware_behave",
        summary: "Forget the faults of a device's firmware",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<FirmwareState>),
        errors: &[ErrorCode::NoSuchDevice, ErrorCode::WrongState, ErrorCode::WrongDeviceState],
        handler: |input| firmware(input, FirmwareChange::Forget),
    },
    Route {
        method: "GET",
        path: "/v1/memory/{id}/census",
        name: "memory_census",
        summary: "Who maps a memory device, or the addresses of one that has departed: all page tables are walked",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<Census>),
        errors: &[ErrorCode::NoSuchDevice, ErrorCode::WrongState],
        handler: |input| Ok(Action::Execute(Command::Census { device: input.id() })),
    },
    Route {
        method: "GET",
        path: "/v1/memory/{id}/poison",
        name: "poison_list",
        summary: "The poison of a device, or of all RAM: its id is ram, and its offsets are guest-physical addresses",
        query: &[
            Parameter {
                name: "from",
                summary: "The first offset of interest, such as the next of the answer before. Default: 0",
                required: false,
                repeated: false,
                schema: of::<Address>,
            },
            Parameter {
                name: "limit",
                summary: "Most ranges to list, 1 to 100000. Default: 10000",
                required: false,
                repeated: false,
                schema: of::<u64>,
            },
        ],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<PoisonState>),
        errors: &[ErrorCode::NoSuchDevice],
        handler: |input| {
            let from = match input.text("from") {
                None => 0,
                Some(text) => text.parse::<Address>().map_err(|error| wrong_value("from", error))?.0,
            };
            let limit = match input.text("limit") {
                None => DEFAULT_LISTED,
                Some(text) => {
                    text.parse().ok().filter(|limit| (1..=MOST_LISTED).contains(limit)).ok_or_else(|| {
                        wrong_value("limit", format_args!("{text:?} is no limit: give 1 to {MOST_LISTED}"))
                    })?
                }
            };
            Ok(Action::Execute(Command::PoisonList { device: input.id(), from, limit }))
        },
    },
    Route {
        method: "POST",
        path: "/v1/memory/{id}/poison",
        name: "poison_add",
        summary: "Make bytes of a device bad: the next load of them is a machine check",
        query: &[],
        request: Some(of::<PoisonPattern>),
        status: 200,
        reply: ReplyKind::Object(of::<PoisonAdded>),
        errors: &[
            ErrorCode::BadJson,
            ErrorCode::NoSuchDevice,
            ErrorCode::OutsideDevice,
            ErrorCode::WrongState,
            ErrorCode::WrongDeviceState,
            ErrorCode::HostLimit,
        ],
        handler: |input| Ok(Action::Execute(Command::PoisonAdd { device: input.id(), what: input.body()? })),
    },
    Route {
        method: "POST",
        path: "/v1/poison",
        name: "poison_place",
        summary: "Make memory bad by its guest-physical address, or by a process of the guest and its virtual address",
        query: &[],
        request: Some(of::<PoisonPlace>),
        status: 200,
        reply: ReplyKind::Object(of::<PoisonPlaced>),
        errors: &[
            ErrorCode::BadJson,
            ErrorCode::OutsideDevice,
            ErrorCode::WrongState,
            ErrorCode::WrongDeviceState,
            ErrorCode::GuestRefused,
            ErrorCode::HostLimit,
        ],
        handler: |input| Ok(Action::Execute(Command::PoisonPlace { place: input.body()? })),
    },
    Route {
        method: "DELETE",
        path: "/v1/memory/{id}/poison",
        name: "poison_clear",
        summary: "Replace bad media by good; the guest's own list stays until it writes",
        query: &[Parameter {
            name: "range",
            summary: "What to clear, such as 0x200040+64; a plus stands for itself. Default: the whole device",
            required: false,
            repeated: true,
            schema: of::<String>,
        }],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<PoisonCleared>),
        errors: &[
            ErrorCode::NoSuchDevice,
            ErrorCode::OutsideDevice,
            ErrorCode::WrongState,
            ErrorCode::WrongDeviceState,
        ],
        handler: |input| {
            let ranges = input.ranges("range")?;
            let ranges = (!ranges.is_empty()).then_some(ranges);
            Ok(Action::Execute(Command::PoisonClear { device: input.id(), ranges }))
        },
    },
    Route {
        method: "GET",
        path: "/v1/memory/{id}/poison/policy",
        name: "poison_policy",
        summary: "What poison of a device does to processors",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<PoisonPolicy>),
        errors: &[ErrorCode::NoSuchDevice],
        handler: |input| {
            Ok(Action::Execute(Command::PoisonPolicy { device: input.id(), change: PolicyChange::default() }))
        },
    },
    Route {
        method: "PATCH",
        path: "/v1/memory/{id}/poison/policy",
        name: "poison_policy_change",
        summary: "Change what poison of a device does to processors",
        query: &[],
        request: Some(of::<PolicyChange>),
        status: 200,
        reply: ReplyKind::Object(of::<PoisonPolicy>),
        errors: &[ErrorCode::BadJson, ErrorCode::NoSuchDevice],
        handler: |input| {
            let change: PolicyChange = input.body()?;
            Ok(Action::Execute(Command::PoisonPolicy { device: input.id(), change }))
        },
    },
    Route {
        method: "POST",
        path: "/v1/memory/{id}/notify",
        name: "notify",
        summary: "Send the guest a notification of a device, whether or not there is a reason for it",
        query: &[],
        request: Some(of::<NotifyRequest>),
        status: 200,
        reply: ReplyKind::Object(of::<Done>),
        errors: &[
            ErrorCode::BadJson,
            ErrorCode::NoSuchDevice,
            ErrorCode::WrongState,
            ErrorCode::WrongDeviceState,
        ],
        handler: |input| {
            let kind = input.body::<NotifyRequest>()?.kind;
            Ok(Action::Execute(Command::Notify { device: input.id(), kind }))
        },
    },
    Route {
        method: "DELETE",
        path: "/v1/devices/{id}",
        name: "device_remove",
        summary: "Take a memory device or a disk away",
        query: &[
            Parameter {
                name: "mode",
                summary: "Whether the device goes first (surprise) or the guest is asked (eject)",
                required: true,
                repeated: false,
                schema: of::<RemoveMode>,
            },
            Parameter {
                name: "via",
                summary: "The channel. Default: the device's own",
                required: false,
                repeated: false,
                schema: of::<Channel>,
            },
            Parameter {
                name: "timeout",
                summary: "How long the guest may take before the removal has failed, such as 10s. Default: 120s",
                required: false,
                repeated: false,
                schema: of::<TimeSpan>,
            },
        ],
        request: None,
        status: 202,
        reply: ReplyKind::Object(of::<Operation>),
        errors: &[
            ErrorCode::NoSuchDevice,
            ErrorCode::WrongState,
            ErrorCode::WrongDeviceState,
            ErrorCode::NotSupported,
            ErrorCode::HostLimit,
        ],
        handler: |input| {
            let (mode, via) = (input.required("mode")?, input.optional("via")?);
            Ok(Action::Execute(Command::Remove {
                device: input.id(),
                mode,
                via,
                timeout: input.span("timeout")?,
            }))
        },
    },
    Route {
        method: "GET",
        path: "/v1/memory/{id}/flushes",
        name: "flush_show",
        summary: "The flushes of a virtio-pmem device that are held, and what is done to those to come",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<FlushState>),
        errors: &[ErrorCode::NoSuchDevice, ErrorCode::NotSupported],
        handler: |input| flush(input, FlushChange::Show),
    },
    Route {
        method: "POST",
        path: "/v1/memory/{id}/flushes/faults",
        name: "flush_fault",
        summary: "Hold, delay or fail flushes to come of a virtio-pmem device",
        query: &[],
        request: Some(of::<FlushFault>),
        status: 200,
        reply: ReplyKind::Object(of::<FlushState>),
        errors: FLUSH_ERRORS,
        handler: |input| flush(input, FlushChange::Arm(input.body()?)),
    },
    Route {
        method: "DELETE",
        path: "/v1/memory/{id}/flushes/faults",
        name: "flush_disarm",
        summary: "Take faults away; what they hold stays held",
        query: &[FAULT],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<FlushState>),
        errors: FLUSH_ERRORS,
        handler: |input| flush(input, FlushChange::Disarm(fault_number(input)?)),
    },
    Route {
        method: "POST",
        path: "/v1/memory/{id}/flushes/release",
        name: "flush_release",
        summary: "Let flushes go on that are held",
        query: &[],
        request: Some(of::<FlushRelease>),
        status: 200,
        reply: ReplyKind::Object(of::<FlushState>),
        errors: FLUSH_ERRORS,
        handler: |input| flush(input, FlushChange::Release(input.body()?)),
    },
    Route {
        method: "GET",
        path: "/v1/disks",
        name: "disk_list",
        summary: "All disks, with their faults and the requests that are held",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<DiskList>),
        errors: &[],
        handler: |_| Ok(Action::Execute(Command::Disk(DiskCommand::List))),
    },
    Route {
        method: "POST",
        path: "/v1/disks",
        name: "disk_insert",
        summary: "Put a disk into a free slot",
        query: &[],
        request: Some(of::<Disk>),
        status: 202,
        reply: ReplyKind::Object(of::<Operation>),
        errors: &[
            ErrorCode::BadJson,
            ErrorCode::InvalidConfig,
            ErrorCode::IdInUse,
            ErrorCode::NoFreeSlot,
            ErrorCode::AddressInUse,
            ErrorCode::NoSuchDevice,
            ErrorCode::WrongState,
            ErrorCode::FileInUse,
            ErrorCode::HostLimit,
        ],
        handler: |input| {
            let disk = Disk::try_from(input.body::<DiskKeys>()?)?;
            disk.validate_insert()?;
            Ok(Action::Execute(Command::InsertDisk { disk: Box::new(disk) }))
        },
    },
    Route {
        method: "GET",
        path: "/v1/disks/{id}",
        name: "disk_show",
        summary: "One disk, with its faults and the requests that are held",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<DiskInfo>),
        errors: &[ErrorCode::NoSuchDevice],
        handler: |input| Ok(Action::Execute(Command::Disk(DiskCommand::Show { device: input.id() }))),
    },
    Route {
        method: "POST",
        path: "/v1/disks/{id}/faults",
        name: "disk_fault",
        summary: "Hold, delay, fail, tear or reorder requests to come",
        query: &[],
        request: Some(of::<DiskFault>),
        status: 200,
        reply: ReplyKind::Object(of::<DiskArmed>),
        errors: &[ErrorCode::BadJson, ErrorCode::NoSuchDevice, ErrorCode::WrongDeviceState],
        handler: |input| {
            let (device, fault) = (input.id(), input.body()?);
            Ok(Action::Execute(Command::Disk(DiskCommand::Arm { device, fault })))
        },
    },
    Route {
        method: "DELETE",
        path: "/v1/disks/{id}/faults",
        name: "disk_disarm",
        summary: "Take faults away; what they hold stays held",
        query: &[FAULT],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<DiskDisarmed>),
        errors: &[ErrorCode::NoSuchDevice, ErrorCode::WrongDeviceState],
        handler: |input| {
            let fault = fault_number(input)?;
            Ok(Action::Execute(Command::Disk(DiskCommand::Disarm { device: input.id(), fault })))
        },
    },
    Route {
        method: "POST",
        path: "/v1/disks/{id}/release",
        name: "disk_release",
        summary: "Let requests go on that are held",
        query: &[],
        request: Some(of::<DiskRelease>),
        status: 200,
        reply: ReplyKind::Object(of::<DiskReleased>),
        errors: &[ErrorCode::BadJson, ErrorCode::NoSuchDevice, ErrorCode::WrongDeviceState],
        handler: |input| {
            let (device, release) = (input.id(), input.body()?);
            Ok(Action::Execute(Command::Disk(DiskCommand::Release { device, release })))
        },
    },
    Route {
        method: "POST",
        path: "/v1/vcpus/{vcpu}/mce",
        name: "mce",
        summary: "Raise a machine check in a vCPU, or log an error in its banks",
        query: &[],
        request: Some(of::<MceRequest>),
        status: 200,
        reply: ReplyKind::Object(of::<MceQueued>),
        errors: &[ErrorCode::BadJson, ErrorCode::NoSuchVcpu, ErrorCode::WrongState],
        handler: |input| {
            let number = input.segment();
            let vcpu = number.parse().map_err(|_| {
                Error::new(
                    ErrorCode::NoSuchVcpu,
                    format!("There is no vCPU {number:?}"),
                    "give its number, counted from 0",
                )
            })?;
            Ok(Action::Execute(Command::RaiseMce { vcpu, request: input.body::<MceRequest>()? }))
        },
    },
    Route {
        method: "POST",
        path: "/v1/cper",
        name: "cper",
        summary: "Tell the guest of an error, as firmware does; the error itself is not made",
        query: &[],
        request: Some(of::<CperRequest>),
        status: 200,
        reply: ReplyKind::Object(of::<CperAccepted>),
        errors: &[ErrorCode::BadJson, ErrorCode::WrongState, ErrorCode::QueueFull],
        handler: |input| Ok(Action::Execute(Command::Cper { request: Box::new(input.body()?) })),
    },
    Route {
        method: "GET",
        path: "/v1/operations/{operation}",
        name: "operation_show",
        summary: "How something stands that was answered with an operation",
        query: &[Parameter {
            name: "wait",
            summary: "How long to wait for its end, such as 10s. Default: not at all",
            required: false,
            repeated: false,
            schema: of::<TimeSpan>,
        }],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<Operation>),
        errors: &[ErrorCode::NoSuchOperation],
        handler: |input| {
            let number = input.segment();
            let operation = number.parse().map_err(|_| {
                Error::new(
                    ErrorCode::NoSuchOperation,
                    format!("There is no operation {number:?}"),
                    "give the number that the request was answered with",
                )
            })?;
            Ok(match input.span("wait")? {
                None => Action::Execute(Command::ShowOperation { operation }),
                Some(patience) => Action::Wait { operation, patience },
            })
        },
    },
    Route {
        method: "GET",
        path: "/v1/events",
        name: "events",
        summary: "What has happened, one event a line",
        query: &[
            Parameter {
                name: "since",
                summary: "Number of the last event that is known already. Default: 0, from the first one",
                required: false,
                repeated: false,
                schema: of::<u64>,
            },
            Parameter {
                name: "follow",
                summary: "1 or true to go on with what happens from now on. Default: end with the last event",
                required: false,
                repeated: false,
                schema: of::<bool>,
            },
        ],
        request: None,
        status: 200,
        reply: ReplyKind::Lines(of::<Record>),
        errors: &[],
        handler: |input| {
            let since = match input.text("since") {
                None => 0,
                Some(text) => text.parse().map_err(|_| {
                    wrong_value("since", format_args!("{text:?} is no number: give that of an event, or 0"))
                })?,
            };
            let follow = match input.text("follow") {
                None | Some("0" | "false") => false,
                Some("1" | "true" | "") => true,
                Some(text) => {
                    return Err(wrong_value("follow", format_args!("{text:?} is no switch: give 1 or 0")));
                }
            };
            Ok(Action::Stream { since, follow })
        },
    },
    Route {
        method: "POST",
        path: "/v1/pause",
        name: "pause",
        summary: "Stop all vCPUs; the guest's clocks run on",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<Done>),
        errors: &[ErrorCode::WrongState],
        handler: |_| Ok(Action::Execute(Command::Pause)),
    },
    Route {
        method: "POST",
        path: "/v1/resume",
        name: "resume",
        summary: "Let the vCPUs run on",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<Done>),
        errors: &[ErrorCode::WrongState],
        handler: |_| Ok(Action::Execute(Command::Resume)),
    },
    Route {
        method: "POST",
        path: "/v1/power/cut",
        name: "power_cut",
        summary: "Take the power away, without a word to the guest; the machine ends, or boots again",
        query: &[],
        request: Some(of::<PowerCut>),
        status: 200,
        reply: ReplyKind::Object(of::<PowerLoss>),
        errors: &[ErrorCode::WrongState],
        handler: |input| Ok(Action::Execute(Command::PowerCut(input.body()?))),
    },
    Route {
        method: "POST",
        path: "/v1/quit",
        name: "quit",
        summary: "End the machine as it is, without a word to the guest",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Object(of::<Done>),
        errors: &[],
        handler: |_| Ok(Action::Execute(Command::Quit)),
    },
    Route {
        method: "GET",
        path: "/v1/openapi.json",
        name: "openapi",
        summary: "This document",
        query: &[],
        request: None,
        status: 200,
        reply: ReplyKind::Document,
        errors: &[],
        handler: |_| Ok(Action::Document),
    },
];
