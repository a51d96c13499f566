//! `aconite ctl`: questions and faults for a running machine.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::mce::MceArgs;
use super::show;
use crate::api::{Answer, Client, ClientError, percent_encode};
use crate::command::{
    CperCommon, CperRequest, CperSection, Error, NotifyKind, Operation, OperationState, PolicyChange,
};
use crate::config::{Channel, ConfigError, Pmem};
use crate::units::{ByteRange, TimeSpan, UnitError};

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
    /// Take a memory device away
    #[command(group = clap::ArgGroup::new("mode").required(true))]
    Remove {
        /// The device
        device: String,
        /// The memory goes first, and the guest learns of it afterwards
        #[arg(long, group = "mode")]
        surprise: bool,
        /// The guest is asked to let go
        #[arg(long, group = "mode")]
        eject: bool,
        /// By this channel [default: the device's own]
        #[arg(long, value_enum)]
        via: Option<Channel>,
        /// Wait for the end, for at most this long [default with --wait: 60s]
        #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "60s")]
        wait: Option<String>,
    },
    /// Put a device into a free slot
    #[command(subcommand)]
    Insert(Insert),
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
    /// End the machine as it is, without a word to the guest
    Quit,
}

/// What to do about poison.
#[derive(Debug, Clone, Subcommand)]
pub enum Poison {
    /// Make bytes bad: the next load of them is a machine check
    Add {
        /// The device, or ram: its offsets are guest-physical addresses
        device: String,
        /// Offsets in the device, such as 0x200040+64
        #[arg(required = true, value_name = "OFFSET[+LENGTH]")]
        ranges: Vec<String>,
    },
    /// What is bad
    List {
        /// The device, or ram
        device: String,
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
            Self::Client(_) | Self::Config(_) | Self::Argument(_) | Self::Output(_) => 2,
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
            Request::Poison(Poison::Add { device, ranges }) => {
                let body = json!({"ranges": parse_ranges(ranges)?});
                self.ask("POST", &memory(device, "/poison"), Some(&body), output)
            }
            Request::Poison(Poison::List { device }) => {
                self.ask("GET", &memory(device, "/poison"), None, output)
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
            Request::Remove { device, surprise, via, wait, .. } => {
                let mode = if *surprise { "surprise" } else { "eject" };
                let via = via.map(|via| format!("&via={}", via.name())).unwrap_or_default();
                let target = format!("{}?mode={mode}{via}", memory(device, ""));
                self.operate("DELETE", &target, None, wait.as_deref(), output)
            }
            Request::Insert(Insert::Pmem { device, wait }) => {
                let pmem = json!(Pmem::parse("pmem", device)?.absolute());
                self.operate("POST", "/v1/memory", Some(&pmem), wait.as_deref(), output)
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
            Request::Quit => self.ask("POST", "/v1/quit", None, output),
        }
    }
}

fn memory(device: &str, rest: &str) -> String {
    format!("/v1/memory/{}{rest}", percent_encode(device))
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
