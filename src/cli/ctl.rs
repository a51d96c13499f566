//! `aconite ctl`: questions and faults for a running machine.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::disk::Disk;
use super::flush::Flush;
use super::mce::MceArgs;
use super::show;
use crate::api::{Answer, Client, ClientError, percent_encode};
use crate::command::{
    CperCommon, CperRequest, CperSection, Error, EveryStride, FirmwareFault, NotifyKind, Operation,
    OperationState, PoisonAlign, PoisonPattern, PoisonPlace, PolicyChange, PowerCut, ProcessMemory,
    RandomLines, StaleAnswer, StaleChange,
};
use crate::config::{self, Channel, ConfigError, Pmem};
use crate::memory::LINE_SIZE;
use crate::units::{Address, ByteRange, Size, TimeSpan, UnitError};

/// Arguments of `aconite ctl`.
#[derive(Debug, Clone, Args)]
pub struct CtlArgs {
    /// The API socket of the machine
    #[arg(short, long, value_name = "PATH")]
    pub socket: PathBuf,
    /// Print replies as JSON
    #[arg(long, global = true)]
    pub json: bool,
    /// What to ask.
    #[command(subcommand)]
    pub request: Request,
}

/// What to ask.
#[derive(Debug, Clone, Subcommand)]
pub enum Request {
    /// About the machine
    Info,
    /// The memory devices
    Memory {
        /// Only this device
        #[arg(value_name = "DEVICE")]
        device: Option<String>,
    },
    /// Make bytes of a device bad, or good again
    #[command(subcommand)]
    Poison(Poison),
    /// Send the guest a notification of a device
    Notify {
        /// The device
        device: String,
        /// What it says
        #[arg(value_enum)]
        kind: NotifyKind,
    },
    /// Raise a machine check in a vCPU, or log an error in its banks
    Mce(MceArgs),
    /// Take a memory device or a disk away
    #[command(group = clap::ArgGroup::new("mode").required(true))]
    Remove {
        /// The device
        device: String,
        /// The device goes first, and the guest learns of it afterwards
        #[arg(long, group = "mode")]
        surprise: bool,
        /// The guest is asked to let go
        #[arg(long, group = "mode")]
        eject: bool,
        /// By this channel [default: the device's own]
        #[arg(long, value_enum)]
        via: Option<Channel>,
        /// How long the guest may take before the removal has failed [default: 120s]
        #[arg(long, value_name = "TIME")]
        timeout: Option<String>,
        /// Wait for the end, for at most this long [default with --wait: 60s]
        #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "60s")]
        wait: Option<String>,
    },
    /// Put a device into a free slot
    #[command(subcommand)]
    Insert(Insert),
    /// Say what a processor gets that touches a device that has departed, and change it first with --answer
    Stale {
        /// The device
        device: String,
        /// What it gets from now on
        #[arg(long, value_enum)]
        answer: Option<StaleAnswer>,
    },
    /// Make the firmware of a device fail calls of the guest, answer them late or wrong, or behave again
    Firmware {
        /// The device
        device: String,
        /// What it is to do [default: say what it does]
        #[command(subcommand)]
        order: Option<FirmwareOrder>,
    },
    /// Who maps a memory device, or the addresses of one that has departed
    Census {
        /// The device
        device: String,
    },
    /// Hold, delay, fail, tear or reorder requests of disks
    #[command(subcommand)]
    Disk(Disk),
    /// Hold, delay or fail flushes of virtio-pmem devices
    #[command(subcommand)]
    Flush(Flush),
    /// Tell the guest of an error, as firmware does; the error itself is not made
    Cper(Cper),
    /// How an operation stands
    Operation {
        /// Its number
        number: u64,
        /// Wait for its end, for at most this long [default with --wait: 60s]
        #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "60s")]
        wait: Option<String>,
    },
    /// What has happened
    Events {
        /// Go on with what happens from now on
        #[arg(short, long)]
        follow: bool,
        /// Only events after this number
        #[arg(long, value_name = "NUMBER", default_value_t = 0)]
        since: u64,
    },
    /// Stop all vCPUs; its clocks run on
    Pause,
    /// Let the vCPUs run on
    Resume,
    /// Take the power away
    #[command(subcommand)]
    Power(Power),
    /// End the machine as it is, without a word to the guest
    Quit,
}

/// What becomes of the power.
#[derive(Debug, Clone, Subcommand)]
pub enum Power {
    /// Take it away without a word to the guest: what was not flushed is lost with --pmem unflushed=drop; the machine ends
    Cut {
        /// About half of the lines that were not flushed survive, the same ones for the same number [default: none]
        #[arg(long, value_name = "NUMBER")]
        seed: Option<u64>,
    },
    /// Take it away as with cut, and give it back: the machine boots again, as it was started
    Cycle {
        /// About half of the lines that were not flushed survive, the same ones for the same number [default: none]
        #[arg(long, value_name = "NUMBER")]
        seed: Option<u64>,
    },
}

/// What to do about poison.
#[derive(Debug, Clone, Subcommand)]
pub enum Poison {
    /// Make bytes bad: the next load of them is a machine check
    Add(#[command(flatten)] Box<PoisonAddArgs>),
    /// What is bad
    List {
        /// The device, or ram
        device: String,
        /// From this offset on, such as the next of the answer before
        #[arg(long, value_name = "OFFSET", default_value = "0x0")]
        from: Address,
        /// At most so many ranges [default: 10000]
        #[arg(long, value_name = "N")]
        limit: Option<u64>,
    },
    /// Say what poison does to processors, and change it first as the options say
    Policy {
        /// The device, or ram
        device: String,
        /// What to change
        #[command(flatten)]
        change: PolicyChange,
    },
    /// Replace bad media by good; the guest's own list stays until it writes
    Clear {
        /// The device, or ram
        device: String,
        /// Offsets in the device, such as 0x200040+64 [default: all of it]
        #[arg(value_name = "OFFSET[+LENGTH]")]
        ranges: Vec<String>,
    },
}

/// What to poison.
#[derive(Debug, Clone, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(false).args(["ranges", "from", "count", "every", "va"]))]
pub struct PoisonAddArgs {
    /// The device, or ram: its offsets are guest-physical addresses
    #[arg(required_unless_present = "pid", conflicts_with = "pid")]
    pub device: Option<String>,
    /// Offsets in the device, such as 0x200040+64
    #[arg(value_name = "OFFSET[+LENGTH]")]
    pub ranges: Vec<String>,
    /// Offsets in a file, one range a line; - is standard input, and # begins a remark
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,
    /// This many lines at random
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
    /// What the choice of --count depends on [default: 0]
    #[arg(long, requires = "count", value_name = "N")]
    pub seed: Option<u64>,
    /// What a line of --count is the first of
    #[arg(long, requires = "count", value_enum)]
    pub align: Option<PoisonAlign>,
    /// A line, or --length bytes, at each multiple of this distance
    #[arg(long, value_name = "STRIDE")]
    pub every: Option<Size>,
    /// Bytes of each piece of --every [default: one line]
    #[arg(long, requires = "every", value_name = "SIZE")]
    pub length: Option<Size>,
    /// Where --count and --every choose [default: all of the device]
    #[arg(long, value_name = "OFFSET+LENGTH", conflicts_with_all = ["ranges", "from", "va"])]
    pub within: Option<ByteRange>,
    /// The memory of a process of the guest: its number there
    #[arg(long, requires = "va")]
    pub pid: Option<u32>,
    /// Virtual address of that memory
    #[arg(long, requires = "pid", value_name = "ADDRESS[+LENGTH]")]
    pub va: Option<ByteRange>,
}

/// What to insert.
#[derive(Debug, Clone, Subcommand)]
pub enum Insert {
    /// Persistent memory
    Pmem {
        /// As for --pmem of run; at= can also name a device that has departed
        #[arg(value_name = "KEY=VALUE,...")]
        device: String,
        /// Wait for the end, for at most this long [default with --wait: 60s]
        #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "60s")]
        wait: Option<String>,
    },
    /// A disk
    Disk {
        /// As for --disk of run; at= can also name a disk that has departed, whose slot it gets
        #[arg(value_name = "KEY=VALUE,...")]
        disk: String,
        /// Wait for the end, for at most this long [default with --wait: 60s]
        #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "60s")]
        wait: Option<String>,
    },
}

/// What firmware is to do.
#[derive(Debug, Clone, Subcommand)]
pub enum FirmwareOrder {
    /// Fail: the answer to a call is a failure, comes late, or is not what it should be
    Fail(FirmwareFault),
    /// Behave: forget all faults
    Behave,
}

/// What to tell the guest of.
#[derive(Debug, Clone, Args)]
pub struct Cper {
    /// What is said of any error.
    #[command(flatten)]
    pub common: CperCommon,
    /// The error.
    #[command(subcommand)]
    pub section: CperSection,
}

/// Why `ctl` failed.
#[derive(Debug, thiserror::Error)]
pub enum CtlError {
    /// The machine refused, or there is none.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A device's description is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An argument is wrong.
    #[error("Wrong argument: {0}")]
    Argument(#[from] UnitError),
    /// A list of ranges cannot be read.
    #[error("The list of ranges {path} cannot be read: name a file that can, or - for standard input")]
    List {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A line of it is wrong.
    #[error("Line {line} of the list of ranges {path} is wrong: {source}")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        source: UnitError,
    },
    /// An operation has failed.
    #[error("Operation {number} on device {device} failed: {error}")]
    Failed {
        /// Its number.
        number: u64,
        /// Its device.
        device: String,
        /// Why.
        error: Error,
    },
    /// An operation still runs.
    #[error(
        "Operation {number} on device {device} still goes on after {patience}: ask with ctl operation {number} --wait"
    )]
    Unfinished {
        /// Its number.
        number: u64,
        /// Its device.
        device: String,
        /// How long was waited.
        patience: TimeSpan,
    },
    /// The reply cannot be printed.
    #[error("The reply cannot be printed: give standard output a reader")]
    Output(#[from] io::Error),
}

impl CtlError {
    /// The exit status: 1 when the machine refused or an operation failed, 2 for a wrong command line or no machine.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Client(ClientError::Refused(_)) | Self::Failed { .. } | Self::Unfinished { .. } => 1,
            Self::Client(_)
            | Self::Config(_)
            | Self::Argument(_)
            | Self::List { .. }
            | Self::Line { .. }
            | Self::Output(_) => 2,
        }
    }
}

/// Asks what `args` say and prints the reply to `output`; with `--json` a refusal is printed there too.
///
/// # Errors
/// See [`CtlError`]; its [`CtlError::exit_status`] is that of the program.
pub fn ctl(args: &CtlArgs, output: &mut dyn Write) -> Result<(), CtlError> {
    let session = Session { client: Client::new(&args.socket), json: args.json };
    match session.run(&args.request, output) {
        // Whoever reads (`ctl events | head`) has seen enough.
        Err(CtlError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(CtlError::Client(ClientError::Refused(error))) if args.json => {
            writeln!(output, "{}", json!({"error": error}))?;
            Err(ClientError::Refused(error).into())
        }
        result => result,
    }
}

impl Session {
    fn run(&self, request: &Request, output: &mut dyn Write) -> Result<(), CtlError> {
        match request {
            Request::Info => self.ask("GET", "/v1/machine", None, output),
            Request::Memory { device: None } => self.ask("GET", "/v1/memory", None, output),
            Request::Memory { device: Some(device) } => self.ask("GET", &memory(device, ""), None, output),
            Request::Poison(Poison::Add(args)) => {
                let (target, body) = args.request()?;
                self.ask("POST", &target, Some(&body), output)
            }
            Request::Poison(Poison::List { device, from, limit }) => {
                let limit = limit.map(|limit| format!("&limit={limit}")).unwrap_or_default();
                let target = format!("{}?from={from}{limit}", memory(device, "/poison"));
                self.ask("GET", &target, None, output)
            }
            Request::Poison(Poison::Policy { device, change }) => {
                let target = memory(device, "/poison/policy");
                if *change == PolicyChange::default() {
                    self.ask("GET", &target, None, output)
                } else {
                    self.ask("PATCH", &target, Some(&json!(change)), output)
                }
            }
            Request::Poison(Poison::Clear { device, ranges }) => {
                let ranges: Vec<String> =
                    parse_ranges(ranges)?.iter().map(|range| format!("range={range}")).collect();
                let separator = if ranges.is_empty() { "" } else { "?" };
                let target = format!("{}{separator}{}", memory(device, "/poison"), ranges.join("&"));
                self.ask("DELETE", &target, None, output)
            }
            Request::Notify { device, kind } => {
                self.ask("POST", &memory(device, "/notify"), Some(&json!({"kind": kind})), output)
            }
            Request::Mce(args) => {
                let target = format!("/v1/vcpus/{}/mce", args.vcpu);
                self.ask("POST", &target, Some(&json!(args.request()?)), output)
            }
            Request::Remove { device, surprise, via, timeout, wait, .. } => {
                let mode = if *surprise { "surprise" } else { "eject" };
                let via = via.map(|via| format!("&via={}", via.name())).unwrap_or_default();
                let timeout = match timeout {
                    Some(timeout) => format!("&timeout={}", timeout.parse::<TimeSpan>()?),
                    None => String::new(),
                };
                let target = format!("/v1/devices/{}?mode={mode}{via}{timeout}", percent_encode(device));
                self.operate("DELETE", &target, None, wait.as_deref(), output)
            }
            Request::Insert(Insert::Pmem { device, wait }) => {
                let pmem = json!(Pmem::parse("pmem", device)?.absolute());
                self.operate("POST", "/v1/memory", Some(&pmem), wait.as_deref(), output)
            }
            Request::Insert(Insert::Disk { disk, wait }) => {
                let disk = json!(config::Disk::parse("disk", disk)?.absolute());
                self.operate("POST", "/v1/disks", Some(&disk), wait.as_deref(), output)
            }
            Request::Stale { device, answer: None } => {
                self.ask("GET", &memory(device, "/stale"), None, output)
            }
            Request::Stale { device, answer: Some(answer) } => {
                let change = StaleChange { answer: *answer };
                self.ask("PATCH", &memory(device, "/stale"), Some(&json!(change)), output)
            }
            Request::Firmware { device, order } => {
                let target = memory(device, "/firmware");
                match order {
                    None => self.ask("GET", &target, None, output),
                    Some(FirmwareOrder::Fail(fault)) => {
                        self.ask("POST", &target, Some(&json!(fault)), output)
                    }
                    Some(FirmwareOrder::Behave) => self.ask("DELETE", &target, None, output),
                }
            }
            Request::Census { device } => self.ask("GET", &memory(device, "/census"), None, output),
            Request::Disk(disk) => {
                let (method, target, body) = disk.request();
                self.ask(method, &target, body.as_ref(), output)
            }
            Request::Flush(flush) => {
                let (method, target, body) = flush.request();
                self.ask(method, &target, body.as_ref(), output)
            }
            Request::Cper(Cper { common, section }) => {
                let request = CperRequest { common: common.clone(), section: section.clone() };
                self.ask("POST", "/v1/cper", Some(&json!(request)), output)
            }
            Request::Operation { number, wait } => match wait {
                None => self.ask("GET", &format!("/v1/operations/{number}"), None, output),
                Some(patience) => self.wait(*number, patience.parse()?, output),
            },
            Request::Events { follow, since } => self.events(*since, *follow, output),
            Request::Pause => self.ask("POST", "/v1/pause", None, output),
            Request::Resume => self.ask("POST", "/v1/resume", None, output),
            Request::Power(power) => {
                let cut = match *power {
                    Power::Cut { seed } => PowerCut { seed, again: false },
                    Power::Cycle { seed } => PowerCut { seed, again: true },
                };
                self.ask("POST", "/v1/power/cut", Some(&json!(cut)), output)
            }
            Request::Quit => self.ask("POST", "/v1/quit", None, output),
        }
    }
}

fn memory(device: &str, rest: &str) -> String {
    format!("/v1/memory/{}{rest}", percent_encode(device))
}

impl PoisonAddArgs {
    /// The route and the body of the request.
    fn request(&self) -> Result<(String, Value), CtlError> {
        if let (Some(pid), Some(va)) = (self.pid, self.va) {
            let process = ProcessMemory { pid, address: va.offset, length: va.length };
            return Ok(("/v1/poison".to_owned(), json!(PoisonPlace::Process(process))));
        }
        let pattern = if let Some(path) = &self.from {
            PoisonPattern::Ranges(ranges_in(path)?)
        } else if let Some(count) = self.count {
            PoisonPattern::Random(RandomLines {
                count,
                seed: self.seed.unwrap_or(0),
                within: self.within,
                align: self.align.unwrap_or_default(),
            })
        } else if let Some(stride) = self.every {
            PoisonPattern::Every(EveryStride {
                stride: stride.bytes(),
                length: self.length.map_or(LINE_SIZE, |length| length.bytes()),
                within: self.within,
            })
        } else {
            PoisonPattern::Ranges(parse_ranges(&self.ranges)?)
        };
        let device = self.device.as_deref().unwrap_or_default();
        Ok((memory(device, "/poison"), json!(pattern)))
    }
}

/// The ranges that a file lists, or standard input if it is called `-`.
fn ranges_in(path: &Path) -> Result<Vec<ByteRange>, CtlError> {
    let read =
        || if path == Path::new("-") { io::read_to_string(io::stdin()) } else { fs::read_to_string(path) };
    let text = read().map_err(|source| CtlError::List { path: path.to_owned(), source })?;
    let mut ranges = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default();
        for word in line.split_whitespace() {
            let range = word.parse().map_err(|source| CtlError::Line {
                path: path.to_owned(),
                line: index + 1,
                source,
            })?;
            ranges.push(range);
        }
    }
    Ok(ranges)
}

fn parse_ranges(texts: &[String]) -> Result<Vec<ByteRange>, UnitError> {
    texts.iter().map(|text| text.parse()).collect()
}

struct Session {
    client: Client,
    json: bool,
}

impl Session {
    fn ask(
        &self,
        method: &str,
        target: &str,
        body: Option<&Value>,
        output: &mut dyn Write,
    ) -> Result<(), CtlError> {
        let answer = self.client.call(method, target, body)?;
        self.print(&answer.body, output)
    }

    fn print(&self, body: &Value, output: &mut dyn Write) -> Result<(), CtlError> {
        if self.json {
            writeln!(output, "{body}")?;
        } else {
            output.write_all(show::reply(body).as_bytes())?;
        }
        output.flush()?;
        Ok(())
    }

    /// Begins an operation and, if asked to, waits for its end.
    fn operate(
        &self,
        method: &str,
        target: &str,
        body: Option<&Value>,
        wait: Option<&str>,
        output: &mut dyn Write,
    ) -> Result<(), CtlError> {
        let patience = wait.map(str::parse::<TimeSpan>).transpose()?;
        let answer = self.client.call(method, target, body)?;
        let Some(patience) = patience else { return self.print(&answer.body, output) };
        let operation = self.operation(&answer)?;
        self.wait(operation.operation, patience, output)
    }

    fn wait(&self, number: u64, patience: TimeSpan, output: &mut dyn Write) -> Result<(), CtlError> {
        let target = format!("/v1/operations/{number}?wait={patience}");
        let answer = self.client.call("GET", &target, None)?;
        let operation = self.operation(&answer)?;
        self.print(&answer.body, output)?;
        match (operation.state, operation.error) {
            (OperationState::Done, _) => Ok(()),
            (OperationState::Running, _) => {
                Err(CtlError::Unfinished { number, device: operation.device, patience })
            }
            (OperationState::Failed, error) => {
                let unknown = || {
                    Error::new(crate::command::ErrorCode::Internal, "No reason was given", "see ctl events")
                };
                let error = error.unwrap_or_else(unknown);
                Err(CtlError::Failed { number, device: operation.device, error })
            }
        }
    }

    fn operation(&self, answer: &Answer) -> Result<Operation, CtlError> {
        serde_json::from_value(answer.body.clone())
            .map_err(|error| self.client.strange(format_args!("it is no operation: {error}")).into())
    }

    fn events(&self, since: u64, follow: bool, output: &mut dyn Write) -> Result<(), CtlError> {
        for record in self.client.events(since, follow)? {
            let record = record?;
            if self.json {
                writeln!(output, "{}", json!(record))?;
            } else {
                writeln!(output, "{}", show::event(&record))?;
            }
            output.flush()?;
        }
        Ok(())
    }
}
