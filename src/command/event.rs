//! What a machine tells of itself.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Census, CperSeverity, DeviceLoss, DiskOutcome, DiskRequest, DiskStatus, DiskTransfer, Error,
    FirmwareTarget, FlushOutcome, InjectionSeverity, InjectionStep, NotifyKind, RemoveMode,
};
use crate::config::Channel;
use crate::units::{Address, ByteRange};

/// One event with its place in the order and in time. One line of the event stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Record {
    /// Its number: 1 for the first event of a machine, without gaps.
    pub seq: u64,
    /// Nanoseconds since the monitor started, on a clock that never goes back.
    pub host_ns: u64,
    /// The wall clock of the host, RFC 3339 in UTC with microseconds.
    pub time: String,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// An access of a vCPU, as the instruction and the page tables tell it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Access {
    /// The vCPU's number.
    pub vcpu: u32,
    /// Address of the instruction.
    pub rip: Address,
    /// The page table root, which tells processes apart.
    pub cr3: Address,
    /// Privilege level: 0 is the kernel, 3 a process.
    pub cpl: u8,
    /// Virtual address of the first byte; missing where the processor uses none (a page walk).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub va: Option<Address>,
    /// Guest-physical address of the first byte.
    pub gpa: Address,
    /// Number of bytes.
    pub bytes: u64,
    /// What is done to them.
    pub direction: Direction,
    /// The instruction in Intel syntax; missing where it could not be decoded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instruction: Option<String>,
    /// The instruction's bytes in hexadecimal, as far as they could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instruction_bytes: Option<String>,
}

/// What an access does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// Data is loaded.
    Read,
    /// Data is stored.
    Write,
    /// Data is loaded and stored by one instruction.
    ReadWrite,
    /// An instruction is fetched.
    Fetch,
    /// A page table entry is read by the processor.
    Walk,
}

/// What was done with an access that was trapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum TrapDecision {
    /// A poisoned line is loaded: the instruction ends in a machine check.
    MachineCheck,
    /// No poisoned line is loaded: the instruction went through.
    Proceed,
    /// The page was opened meanwhile: the instruction is tried again.
    Retry,
}

/// Who raised an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MceOrigin {
    /// The vCPU itself: it consumed poison.
    Access,
    /// Another vCPU: its error is broadcast, and there is nothing of it in this one's banks.
    Broadcast,
    /// A request to the API.
    Request,
    /// The guest, by its firmware's error injection (EINJ).
    Injection,
    /// The host: its own memory is bad.
    Host,
}

/// A step of a removal. Not every removal goes through all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RemovalStep {
    /// The removal was asked for.
    Requested,
    /// The guest was told.
    Notified,
    /// The guest is letting go.
    Quiescing,
    /// The guest has ejected the device.
    Ejected,
    /// The guest does not let go.
    Refused,
    /// The guest has not answered in time.
    TimedOut,
    /// The device is gone without the guest's consent.
    Surprised,
    /// The departure is complete: id and address are free.
    Departed,
    /// Another device is at the address, or in the slot.
    Replaced,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The vCPUs run for the first time.
    MachineStarted {
        /// Number of vCPUs.
        vcpus: u32,
    },
    /// All vCPUs stand still.
    Paused,
    /// The vCPUs run on.
    Resumed,
    /// The guest reported a panic (pvpanic).
    GuestPanicked,
    /// The guest reported that it boots its crash kernel (pvpanic).
    CrashLoaded,
    /// The guest asked for a reset, or its processors shut down.
    Reset {
        /// How: `acpi`, `keyboard_controller`, `triple_fault` and the like.
        cause: String,
    },
    /// Power was taken away.
    PowerCut {
        /// Devices of which only what is flushed is durable.
        devices: Vec<DeviceLoss>,
    },
    /// The guest switched itself off.
    PoweredOff,
    /// The monitor ends the machine.
    MachineStopped {
        /// Why: `quit`, `timeout`, `powered_off`, `panicked` and the like.
        cause: String,
    },
    /// The agent in the guest answers.
    AgentReady {
        /// Version of the guest's kernel, as `uname -r` has it.
        kernel: String,
    },
    /// The guest's command has ended.
    CommandExited {
        /// Its status, if it ended by itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        status: Option<i32>,
        /// The signal that ended it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signal: Option<i32>,
    },
    /// Poison was added.
    PoisonAdded {
        /// The device.
        device: String,
        /// What is poisoned by it, after rounding; the first ones of many.
        ranges: Vec<ByteRange>,
        /// How many ranges there are in all.
        count: u64,
        /// Their bytes.
        bytes: u64,
    },
    /// Poison is gone.
    PoisonCleared {
        /// The device.
        device: String,
        /// What was poisoned before; the first ones of many.
        ranges: Vec<ByteRange>,
        /// How many ranges there are in all.
        count: u64,
        /// Their bytes.
        bytes: u64,
        /// Who cleared it.
        by: ClearedBy,
    },
    /// A vCPU touched a page with poison in it.
    PoisonTrapped {
        /// The device.
        device: String,
        /// Offset of the first byte in the device.
        offset: Address,
        /// The access.
        #[serde(flatten)]
        access: Access,
        /// What was done.
        decision: TrapDecision,
        /// Why.
        reason: String,
    },
    /// Memory of the host under a device went bad. What was there is lost, and is poison to the guest from now on.
    HostMemoryError {
        /// The device.
        device: String,
        /// Offset of the first bad byte in the device.
        offset: Address,
        /// Number of bad bytes.
        bytes: u64,
        /// Whether somebody had accessed it.
        consumed: bool,
    },
    /// A machine check was delivered to a vCPU.
    MceDelivered {
        /// The vCPU's number.
        vcpu: u32,
        /// The bank that holds the error.
        bank: u8,
        /// `MCi_STATUS`.
        status: Address,
        /// `MCi_ADDR`.
        address: Address,
        /// `MCi_MISC`.
        misc: Address,
        /// `MCG_STATUS`.
        mcg_status: Address,
        /// Who raised it.
        origin: MceOrigin,
        /// Vector of what was being delivered and gave way to it. An interrupt and the NMI (2) come again by
        /// themselves, a fault with its instruction.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        gave_way: Option<u8>,
    },
    /// An error was put into a bank, and no machine check raised: the guest finds it when it polls.
    MceLogged {
        /// The vCPU's number.
        vcpu: u32,
        /// The bank that holds the error.
        bank: u8,
        /// `MCi_STATUS`.
        status: Address,
        /// `MCi_ADDR`.
        address: Address,
        /// `MCi_MISC`.
        misc: Address,
        /// Who raised it.
        origin: MceOrigin,
    },
    /// A machine check came to a vCPU that could not take it, and shut it down.
    MceShutdown {
        /// The vCPU's number.
        vcpu: u32,
        /// The bank that holds the error.
        bank: u8,
        /// `MCi_STATUS`.
        status: Address,
        /// `MCi_ADDR`.
        address: Address,
        /// `MCi_MISC`.
        misc: Address,
        /// Who raised it.
        origin: MceOrigin,
        /// Why it could not be taken.
        cause: String,
    },
    /// The guest finds errors of the previous boot in its boot error region (BERT). They are shown this once.
    BootErrorsShown {
        /// Number of records.
        records: usize,
    },
    /// An error record was taken to be put before the guest.
    CperQueued {
        /// Its number.
        record: u64,
        /// The error source: `corrected`, `uncorrected`, `nmi` or `polled`.
        source: String,
        /// How bad the error is.
        severity: CperSeverity,
        /// What kind of section describes it.
        section: String,
    },
    /// An error record is before the guest, which was notified.
    CperDelivered {
        /// Its number.
        record: u64,
        /// The error source.
        source: String,
    },
    /// The guest has taken an error record.
    CperAcknowledged {
        /// Its number.
        record: u64,
        /// The error source.
        source: String,
    },
    /// An error record could not be put before the guest.
    CperLost {
        /// Its number.
        record: u64,
        /// The error source.
        source: String,
        /// Why.
        reason: String,
    },
    /// The guest injects an error through its firmware (EINJ).
    ErrorInjection {
        /// Number of the injection.
        injection: u32,
        /// How far it has come.
        step: InjectionStep,
        /// How bad the error is.
        severity: InjectionSeverity,
        /// Guest-physical address of the error.
        gpa: Address,
        /// Why it was refused, or what became of it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
    },
    /// A device's DMA met poison; its request failed.
    DmaPoisoned {
        /// The device whose DMA it was.
        by: String,
        /// The device that the poison is in.
        device: String,
        /// Guest-physical address of the first byte that was wanted.
        gpa: Address,
        /// Number of bytes.
        bytes: u64,
        /// Guest-physical address of the first poisoned line among them.
        line: Address,
        /// Whether memory was written.
        direction: Direction,
    },
    /// A notification was put before the guest.
    NotifySent {
        /// The device.
        device: String,
        /// What it says.
        kind: NotifyKind,
    },
    /// The answer to the guest's firmware call met a planned fault.
    FirmwareFault {
        /// The device.
        device: String,
        /// What was called.
        target: FirmwareTarget,
        /// Function of a `_DSM`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        function: Option<u32>,
        /// The first word of the answer, in most of them the status; none if it is shorter.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        status: Option<u32>,
    },
    /// A removal went a step on.
    Removal {
        /// The device.
        device: String,
        /// The operation that the request was answered with.
        operation: u64,
        /// The step.
        step: RemovalStep,
        /// How it was asked for.
        mode: RemoveMode,
        /// By which channel.
        channel: Channel,
        /// What else is to be said.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
    },
    /// A device has arrived, and the guest was told.
    Inserted {
        /// The device.
        device: String,
        /// The operation that the request was answered with.
        operation: u64,
        /// Guest-physical address of its first byte, if it is memory.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        gpa: Option<Address>,
        /// Its size in bytes.
        size: u64,
    },
    /// Who maps the addresses of a departed device at the moment at which another one comes in its place: what these
    /// mappings reach from now on is the new device.
    Census {
        /// The operation that the insertion was answered with.
        operation: u64,
        /// What was found.
        #[serde(flatten)]
        census: Box<Census>,
    },
    /// An operation has ended; its state can be asked for.
    OperationFinished {
        /// Its number.
        operation: u64,
        /// Why it failed; missing if it did not.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<Error>,
    },
    /// A vCPU touched memory that has departed. Sent in full the first times, then at intervals with the count.
    StaleAccess {
        /// The device that was there.
        device: String,
        /// Offset of the first byte in it.
        offset: Address,
        /// The access.
        #[serde(flatten)]
        access: Access,
        /// How many there were of this instruction, page table root, page and direction up to now.
        count: u64,
    },
    /// A vCPU touched memory behind a locked DIMM. Sent as `stale_access` is.
    LockedAccess {
        /// The device.
        device: String,
        /// Offset of the first byte in it.
        offset: Address,
        /// The access.
        #[serde(flatten)]
        access: Access,
        /// How many there were of this instruction, page table root, page and direction up to now.
        count: u64,
    },
    /// Memory was locked or unlocked with the DIMMs behind it.
    MemoryLock {
        /// The device.
        device: String,
        /// Whether nobody gets at its data now.
        locked: bool,
    },
    /// A device's request met memory that has departed, or is locked; nothing landed anywhere.
    StaleDma {
        /// The device whose DMA it was.
        by: String,
        /// The memory device that has departed or is locked, or the one that was spared because it is in its place by now.
        device: String,
        /// Guest-physical address.
        gpa: Address,
        /// Number of bytes.
        bytes: u64,
        /// What was tried.
        direction: Direction,
    },
    /// A request of a disk is held.
    DiskHeld {
        /// The request.
        #[serde(flatten)]
        of: DiskRequest,
        /// When its data moves.
        transfer: DiskTransfer,
    },
    /// A request of a disk is held no longer.
    DiskReleased {
        /// The request.
        #[serde(flatten)]
        of: DiskRequest,
        /// How it goes on.
        how: DiskOutcome,
        /// Nanoseconds for which it was held.
        held_ns: u64,
    },
    /// The guest has got a request back that had met a fault.
    DiskCompleted {
        /// The request.
        #[serde(flatten)]
        of: DiskRequest,
        /// How it ended.
        status: DiskStatus,
    },
    /// The guest waits for a flush of a device, and the device holds it.
    FlushHeld {
        /// The device.
        device: String,
        /// Number of the flush, from 1 on for each device.
        request: u64,
        /// Number of the fault that it has met.
        fault: u64,
    },
    /// A flush is held no longer, or was left behind.
    FlushReleased {
        /// The device.
        device: String,
        /// Number of the flush.
        request: u64,
        /// Number of the fault that it has met; 0 if it has met none.
        fault: u64,
        /// How it goes on.
        how: FlushOutcome,
        /// Nanoseconds for which it has waited.
        held_ns: u64,
    },
    /// The guest has got the answer to a flush that had met a fault.
    FlushCompleted {
        /// The device.
        device: String,
        /// Number of the flush.
        request: u64,
        /// Number of the fault that it has met.
        fault: u64,
        /// Whether the answer is that everything is durable.
        durable: bool,
    },
    /// A device of the machine met an error of the host or of the guest's driver.
    DeviceError {
        /// The device.
        device: String,
        /// What went wrong.
        message: String,
    },
    /// A vCPU can go no further; what is known about it.
    VcpuStuck {
        /// The vCPU's number.
        vcpu: u32,
        /// Where it stands.
        rip: Address,
        /// What was found out.
        diagnosis: String,
    },
    /// This reader was too slow, or asked for events too old: some are lost to it.
    EventsLost {
        /// How many.
        count: u64,
        /// Number of the first lost event; the last one is the number of this record.
        first: u64,
    },
}

/// Most ranges that an event of poison lists.
const MOST_LISTED: usize = 64;

impl Event {
    /// The event of poison that was added.
    pub fn poison_added(device: &str, ranges: &[ByteRange]) -> Self {
        let (listed, count, bytes) = listed(ranges);
        Self::PoisonAdded { device: device.to_owned(), ranges: listed, count, bytes }
    }

    /// The event of poison that was cleared.
    pub fn poison_cleared(device: &str, ranges: &[ByteRange], by: ClearedBy) -> Self {
        let (listed, count, bytes) = listed(ranges);
        Self::PoisonCleared { device: device.to_owned(), ranges: listed, count, bytes, by }
    }
}

fn listed(ranges: &[ByteRange]) -> (Vec<ByteRange>, u64, u64) {
    let first = ranges.iter().take(MOST_LISTED).copied().collect();
    (first, ranges.len() as u64, ranges.iter().map(|range| range.length).sum())
}

/// Who cleared poison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClearedBy {
    /// A request to the API: good media in the place of bad.
    Request,
    /// The guest's driver, by the firmware call that clears errors.
    Guest,
    /// A processor that wrote the whole line, of a device whose policy is to take that for a repair.
    Store,
}
