//! The software KVM host: real KVM on a machine that has none.
//!
//! QEMU's TCG emulates AMD SVM with nested paging, so a stock kernel inside it has a real `/dev/kvm`. Three parties:
//!
//! ```text
//! front end  aconite run ...         the user's terminal, sockets and locks; passes all else through
//!    |  the agent's protocol over a Unix socket
//! keeper     aconite __keeper        owns QEMU; shared by all front ends of one user; ends when idle
//!    |  the agent's protocol over a virtio console port
//! level 1    agent, PID 1            starts `aconite run ...` again, where KVM works
//! ```
//!
//! Level 1 sees the host's files under their own paths ([`machine`]). When a front end goes, however it goes, the
//! keeper sends the program in level 1 SIGTERM: a monitor stops its machine and syncs its files. What a guest has
//! flushed is on the host; what it has only written is in the memory of level 1 until then, and lost if the keeper
//! or QEMU is killed.

pub mod front;
pub mod keeper;
pub mod line;
pub mod machine;
pub mod place;
pub mod private;
pub mod router;

use super::manifest::NESTED_KERNEL;
use super::material::{FETCH_REMEDY, Kernel, Material, Qemu};
use crate::api::SocketError;
use crate::guest::AGENT;
use crate::guest::client::ClientError;
use crate::guest::initramfs::{self, Contents, ModuleRequest};
use machine::{Clock, Machine, Parts};
use place::{Key, Owned, Place};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// The hidden command that makes a process the keeper.
pub const KEEPER_COMMAND: &str = "__keeper";

/// The hidden command that runs a command of the host inside.
pub const INSIDE_COMMAND: &str = "__inside";

/// Seconds without a front end after which the keeper ends, if other than 60.
pub const IDLE_VARIABLE: &str = "ACONITE_NESTED_IDLE";

/// How long the keeper waits for the next front end.
const IDLE: Duration = Duration::from_secs(60);

/// How long a keeper waits for another one to end that is ending.
const TAKEOVER: Duration = Duration::from_secs(60);

/// Why the software KVM host cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NestedError {
    /// No QEMU.
    #[error(
        "The software KVM host needs QEMU, and none was found. Remedy: {FETCH_REMEDY}, or install qemu-system-x86"
    )]
    NoQemu,
    /// No kernel for level 1.
    #[error(
        "The software KVM host needs the kernel {NESTED_KERNEL}, which was not found. Remedy: {FETCH_REMEDY}"
    )]
    NoKernel,
    /// A file that it consists of, or its directory, cannot be used.
    #[error("Cannot set up the software KVM host")]
    Files(#[source] io::Error),
    /// The keeper did not start.
    #[error("Cannot start the keeper of the software KVM host")]
    Spawn(#[source] io::Error),
    /// The command to be run inside.
    #[error("Cannot run {program:?}")]
    Command {
        /// The program.
        program: OsString,
        /// Why not.
        source: io::Error,
    },
    /// The keeper gave up.
    #[error("The software KVM host did not start: {0}")]
    Failed(String),
    /// The connection to it, or the program in it, failed.
    #[error("The software KVM host failed")]
    Agent(#[from] ClientError),
    /// The terminal, a signal or a thread of this process.
    #[error("Cannot pass the terminal and signals on")]
    Local(#[source] io::Error),
    /// The API socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
}

/// What the software KVM host is made of here.
#[derive(Debug)]
pub struct Nested {
    qemu: Qemu,
    kernel: Kernel,
    material: Material,
    place: Place,
}

impl Nested {
    /// Finds its parts.
    ///
    /// # Errors
    /// One of them is missing.
    pub fn find() -> Result<Self, NestedError> {
        let material = Material::find();
        let qemu = Qemu::find(material.as_ref()).ok_or(NestedError::NoQemu)?;
        let material = material.ok_or(NestedError::NoKernel)?;
        let kernel = material.kernel(NESTED_KERNEL).ok_or(NestedError::NoKernel)?;
        let key = Key::new(&qemu, &kernel, AGENT, &machine::settings()).map_err(NestedError::Files)?;
        let place = Place::new(key).map_err(NestedError::Files)?;
        Ok(Nested { qemu, kernel, material, place })
    }
}

/// `aconite __keeper`: becomes the keeper, or returns at once if there is one.
///
/// # Errors
/// The software KVM host did not start, or ended by itself. The same words are in [`Place::failure`].
pub fn keep() -> Result<(), NestedError> {
    let nested = Nested::find()?;
    super::sys::unblock_signals().map_err(NestedError::Spawn)?;
    std::env::set_current_dir("/").map_err(NestedError::Files)?;
    let deadline = Instant::now() + TAKEOVER;
    let owned = loop {
        if let Some(owned) = nested.place.try_own().map_err(NestedError::Files)? {
            break owned;
        }
        if UnixStream::connect(nested.place.socket()).is_ok() || Instant::now() > deadline {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    owned.forget_failure();
    let words = |error: io::Error| NestedError::Failed(owned.report_failure(&error.to_string()));
    // Of a keeper that was killed: this process owns the place.
    let _ = fs::remove_file(nested.place.socket());
    let listener = UnixListener::bind(nested.place.socket()).map_err(words)?;
    // Front ends that are connected already read the report when the listener goes, after it has been written.
    let service =
        start(&nested, &owned, &listener).map_err(|text| NestedError::Failed(owned.report_failure(&text)))?;
    drop(listener);
    keeper::serve(service).map_err(NestedError::Failed)
}

fn start<'a>(
    nested: &Nested,
    owned: &'a Owned,
    listener: &UnixListener,
) -> Result<keeper::Service<'a>, String> {
    let words = |what: &'static str| move |error: io::Error| format!("{what}: {error}");
    let listener = listener.try_clone().map_err(words("Cannot listen for front ends"))?;
    let place = owned.place();
    let log = File::create(place.log()).map_err(words("Cannot write the log"))?;
    let image = place.image();
    // Gives memory back; level 1 works without.
    let balloon = ModuleRequest { name: "virtio_balloon".into(), needed: false, load: true };
    pack(nested, &image, vec![balloon])?;
    let parts = Parts {
        qemu: &nested.qemu,
        kernel: &nested.kernel,
        image: &image,
        console: &place.console(),
        log: log.try_clone().map_err(words("Cannot write the log"))?,
        clock: Clock::Wall,
    };
    let (machine, agent) = Machine::start(parts).map_err(words("Cannot start QEMU"))?;
    let idle = std::env::var(IDLE_VARIABLE)
        .ok()
        .and_then(|text| text.parse().ok())
        .map_or(IDLE, Duration::from_secs);
    Ok(keeper::Service { owned, listener, machine, agent, idle, log })
}

/// Packs the image that level 1 starts from, with modules beside those that it needs.
fn pack(nested: &Nested, image: &Path, modules: Vec<ModuleRequest>) -> Result<(), String> {
    let mut contents = Contents::nested_host(Some(nested.kernel.modules.clone()), Vec::new());
    contents.module_requests.extend(modules);
    let packed = initramfs::pack(&contents).map_err(|error| format!("Cannot pack level 1: {error}"))?;
    fs::write(image, packed.bytes).map_err(|error| format!("Cannot write {}: {error}", image.display()))
}
