//! Frames and messages between the agent and whoever drives it.
//!
//! One ordered byte stream carries everything: in a guest it is the virtio console
//! port [`PORT_NAME`], in the first-level machine of the nested host the same port
//! of QEMU, in tests a socket pair. The side that opens channels is called the
//! *host*, the other side is the *agent*.
//!
//! # Frames
//! ```text
//! 0  u32  length of all that follows this field, at most MAX_FRAME - 4
//! 4  u32  channel; 0 is the session itself
//! 8  u8   kind of message
//! 9  ...  the message, see `Message`
//! ```
//! Integers are little-endian. A byte string is a `u32` length and the bytes, a list
//! is a `u32` count and the items. A frame must be used up exactly by its message.
//!
//! # A session
//! 1. The host sends [`Message::Hello`] with its version and a nonce other than 0, and drops
//!    everything until a `Hello` with that nonce comes back. The agent also says `Hello` with
//!    nonce 0 when it starts; a host that meets that one repeats its own, since the first may have
//!    gone to nobody. An agent that meets a `Hello` with a new nonce ends all channels of the
//!    session before; one with the nonce of the present session is answered and changes nothing.
//! 2. The host opens channels, with numbers of its choice other than 0 that are not in use, by one
//!    of the requests [`Message::Exec`], [`Message::Connect`], [`Message::Mount`],
//!    [`Message::Unmount`] or [`Message::Power`].
//! 3. The agent ends each channel with exactly one [`Message::Exit`] or [`Message::Failed`]; after
//!    it the number is free. `Exec` and `Connect` first answer with [`Message::Opened`]. The host can
//!    ask for an early end with [`Message::Close`], and still gets the end. Messages for a
//!    channel that is not open are ignored: the two sides may have crossed.
//!
//! `Exit` comes when the process itself is gone and what it has written has been sent. A
//! descendant that keeps the output open does not hold it up.
//!
//! # Flow control
//! Each stream of each channel starts with [`INITIAL_WINDOW`] bytes of credit for its sender.
//! The receiver returns credit with [`Message::Credit`] as it passes bytes on, so what it must
//! store for a slow reader is bounded by the window, and the streams never hold each other up.
//! Sending beyond the window breaks the protocol.
//!
//! # Errors
//! Bytes that are no frame end the session: the agent ends its channels and looks for the next
//! `Hello` ([`Decoder::resynchronize`]), the host reports the error.

pub use crate::wire::{Decoder, ProtocolError};

/// Version of this protocol. Both sides must have the same.
pub const VERSION: u32 = 1;
/// Name of the virtio console port that carries the protocol.
pub const PORT_NAME: &str = "org.aconite.agent";
/// Longest frame in bytes, its length field included.
pub const MAX_FRAME: usize = 64 * 1024;
/// Bytes of a frame in front of its message.
pub const HEADER: usize = 9;
/// Most bytes that one [`Message::Data`] carries. (A frame could hold more; the
/// driver of the virtio console sends 32 KiB at a time.)
pub const MAX_DATA: usize = 32 * 1024;
/// Credit, in bytes, that each stream has when its channel opens.
pub const INITIAL_WINDOW: u32 = 256 * 1024;
/// Channels that an agent serves at a time; a request beyond is answered with `Failed`.
pub const MAX_CHANNELS: usize = 512;
/// Channel of the session itself, where only [`Message::Hello`] is sent.
pub const SESSION: u32 = 0;

/// The byte streams of a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// To the process, or to the connected socket.
    Stdin,
    /// From the process or its terminal, or from the connected socket.
    Stdout,
    /// From the process; not used with a terminal or a socket.
    Stderr,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters a line.
    pub columns: u16,
}

/// What kind of thing speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The side that opens channels.
    Host,
    /// The agent of a guest, PID 1 there.
    Guest,
    /// The agent of the first-level machine of the nested host, PID 1 there.
    NestedHost,
    /// The agent as an ordinary process (tests).
    Process,
}

/// Who speaks, and for which session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// [`VERSION`] of the sender. If it is another one, the fields after the nonce are not those of the sender.
    pub version: u32,
    /// The host's choice for its session, not 0; from the agent the nonce that it answers, 0 if none.
    pub nonce: u64,
    /// The sender's part.
    pub role: Role,
    /// `/dev/kvm` exists and could be opened (role [`Role::NestedHost`]; false elsewhere).
    pub kvm: bool,
    /// Kernel release of the machine, as `uname -r` prints it; empty from the host.
    pub release: String,
    /// Kernel version of the machine, as `uname -v` prints it; empty from the host.
    pub kernel: String,
    /// What did not go well when the agent started, in words; empty when all is well.
    pub notes: Vec<String>,
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exec {
    /// The program and its arguments; a program without a slash is looked up in `PATH`.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=value`, added to `PATH`, `HOME=/root` and `TERM=linux` of the agent, and winning over them.
    pub env: Vec<Vec<u8>>,
    /// Start in this directory; empty means `/`.
    pub cwd: Vec<u8>,
    /// Run on a terminal of its own of this size, whose output is all on [`Stream::Stdout`].
    pub terminal: Option<WindowSize>,
}

/// A directory of the other side, shared by 9p, and where it goes; paths are absolute.
///
/// The agent makes missing directories on the way. In the nested host the path is one in the new root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Mount tag of the virtio 9p device.
    pub tag: String,
    /// Where to mount it.
    pub path: Vec<u8>,
    /// Mount options with commas between them, such as `trans=virtio,version=9p2000.L,cache=mmap`.
    /// `ro`, `nosuid`, `nodev`, `noexec` and `noatime` become mount flags, the rest goes to the file system.
    pub options: String,
}

/// What becomes of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// Sync, then power off.
    Off,
    /// Sync, then restart.
    Reboot,
}

/// How a process, or another request, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// It exited with this status; 0 also for a request that has been carried out and a
    /// connection that has been closed.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl ExitStatus {
    /// The status that a shell would show: the code, or 128 and the number of the signal.
    pub fn shell_code(self) -> i32 {
        match self {
            ExitStatus::Code(code) => code,
            ExitStatus::Signal(signal) => 128 + signal,
        }
    }

    /// It exited with status 0.
    pub fn success(self) -> bool {
        self == ExitStatus::Code(0)
    }
}

/// All that is said. H marks what the host says, A what the agent says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// H, A (channel 0): opens a session.
    Hello(Hello),
    /// H: run a command.
    Exec(Exec),
    /// H: connect to the Unix stream socket at this path.
    Connect(Vec<u8>),
    /// H: mount a share; `Exit(Code(0))` when it is there.
    Mount(Share),
    /// H: unmount what is at this path; `Exit(Code(0))` when it is gone.
    Unmount(Vec<u8>),
    /// H: sync and end the machine. There is an answer only when it fails.
    Power(Power),
    /// A: the process runs (its id), or the connection stands (0).
    Opened(u32),
    /// A: the request could not be carried out; the channel is closed.
    Failed {
        /// The number of the operating system's error, 0 if it was something else.
        errno: i32,
        /// What went wrong, in words.
        text: String,
    },
    /// H, A: bytes of a stream, at least one and at most [`MAX_DATA`], within the credit.
    Data(Stream, Vec<u8>),
    /// H, A: nothing more will come on this stream.
    Eof(Stream),
    /// H, A: this many more bytes may be sent on this stream.
    Credit(Stream, u32),
    /// H: send this signal to the process group (with a terminal: to its foreground group).
    Signal(i32),
    /// H: the terminal has a new size.
    Resize(WindowSize),
    /// H: end this channel: the process group is killed, the connection closed.
    Close,
    /// A: it has ended; the channel is closed.
    Exit(ExitStatus),
}

/// A message and its channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Channel that it belongs to, [`SESSION`] for the session itself.
    pub channel: u32,
    /// What is said.
    pub message: Message,
}
