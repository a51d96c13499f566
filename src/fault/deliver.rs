//! Machine checks for any vCPU: raised by a trap, by a request, by a device, or by another vCPU's error.
//!
//! There is one delivery, [`Injector::deliver`], and it is always done by the vCPU's own thread outside KVM_RUN: a
//! trap calls it at the instruction, everything else waits in the vCPU's queue and is delivered before the next
//! KVM_RUN ([`Injector::deliver_waiting`]). Who puts something into a queue kicks the vCPU; a halted one wakes.
//!
//! On Intel without local machine checks an error is everybody's: the vCPU that has it queues a bystander's share to
//! all others, within the second that Linux waits for them (`mce_start` in arch/x86/kernel/cpu/mce/core.c). Nobody
//! waits for anybody here, so it makes no difference whether the first one holds the baton.
//!
//! The next error may follow before a bystander has left its handler of the first: hardware's processors leave it
//! together (`mce_end`), but a vCPU may be without a processor of the host just then. Its share of the next error
//! waits until it has cleared MCIP and had time to return (it is still on the handler's stack, which another machine
//! check would begin again), or for as long as Linux waits for it.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aconite_devices::irq::MsiSink;
use thiserror::Error;

use super::inject::{exception_in_flight, request_again, take_back_events};
use crate::command::{Event, EventBus, MceOrigin};
use crate::kvm::{Baton, KvmError, Vcpu};
use crate::x86::mca::{
    BankRecord, Consequence, MachineError, McaConfig, McaState, Raised, Reach, ShutdownCause,
};

/// Most errors that wait for one vCPU: a paused machine delivers none.
const MOST_WAITING: usize = 256;
/// The vector of the non-maskable interrupt.
const NMI_VECTOR: u8 = 2;
/// How long an exception that is being delivered may keep a queued machine check waiting, in milliseconds.
const AGAIN_MS: u32 = 1;
/// How long a bystander may take to leave its handler of the error before (the time-out of `mce_timed_out`).
const HANDLER: Duration = Duration::from_secs(1);
/// How often a bystander that has cleared MCIP runs for [`AGAIN_MS`] before it counts as returned, if its handler has no
/// stack of its own by which that can be told: a timer may interrupt it before it has done anything.
const RETURNS: u32 = 3;

/// An error to raise, and how far it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// The error.
    pub what: What,
    /// Which vCPUs get it.
    pub reach: Reach,
    /// Who raises it: what its event says.
    pub origin: MceOrigin,
    /// It waits until the vCPU is in this mode.
    pub mode: Option<Mode>,
}

/// A privilege that a vCPU runs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// CPL 3.
    User,
    /// Any other.
    Kernel,
}

impl Mode {
    fn of(vcpu: &Vcpu) -> Result<Self, KvmError> {
        // SS.DPL is the CPL (SDM volume 3, 5.5).
        Ok(if vcpu.sregs()?.ss.dpl == 3 { Self::User } else { Self::Kernel })
    }
}

/// An error as its kind or as registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The registers follow from the guest's machine-check architecture.
    Error(MachineError),
    /// The registers are given.
    Record(BankRecord),
}

impl Injection {
    /// An error that goes as far as the guest's machine-check architecture says.
    pub fn error(error: MachineError, origin: MceOrigin) -> Self {
        Self { what: What::Error(error), reach: Reach::Architecture, origin, mode: None }
    }

    /// An error whose registers are given, and that goes as far as the guest's machine-check architecture says.
    pub fn record(record: BankRecord, origin: MceOrigin) -> Self {
        Self { what: What::Record(record), reach: Reach::Architecture, origin, mode: None }
    }
}

/// What became of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// Vector 18 is the next thing that the vCPU sees.
    MachineCheck,
    /// It is in the bank and nothing more: the guest finds it when it polls.
    Logged,
    /// The vCPU shuts down.
    Shutdown(ShutdownCause),
}

/// What a queue has for its vCPU now.
#[derive(Debug)]
enum Next {
    Nothing,
    /// Something that must wait.
    Later,
    Now(Waiting),
}

/// What [`Injector::deliver_waiting`] leaves to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nothing.
    Done,
    /// An exception is being delivered or handled, or the vCPU is not in the mode asked for: the guest has to run first,
    /// and is interrupted soon.
    Later,
    /// The vCPU shuts down.
    Shutdown,
}

/// Why an error cannot be raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum InjectError {
    /// There is no such vCPU.
    #[error("There is no vCPU {vcpu}: the machine has {count}, numbered from 0")]
    NoSuchVcpu {
        /// What was asked for.
        vcpu: u32,
        /// How many there are.
        count: u32,
    },
    /// There is no such bank.
    #[error("There is no machine-check bank {bank}: the guest has {count}, numbered from 0")]
    NoSuchBank {
        /// What was asked for.
        bank: u8,
        /// How many there are.
        count: u8,
    },
    /// Too many errors wait.
    #[error("{MOST_WAITING} machine checks wait for vCPU {vcpu} already: let it run first")]
    Full {
        /// The vCPU.
        vcpu: u32,
    },
}

/// What waits for a vCPU.
#[derive(Clone, Copy, Debug)]
enum Waiting {
    /// An error of its own.
    Own(Injection),
    /// Its share of an error of another vCPU.
    Bystander {
        /// When that was raised.
        since: Instant,
        /// How often the vCPU must still run before it has returned from its handler.
        returns: u32,
    },
}

#[derive(Debug, Default)]
struct Queue {
    /// Fast view of `list`.
    waiting: AtomicBool,
    list: Mutex<VecDeque<Waiting>>,
}

impl Queue {
    fn list(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, item: Waiting) -> bool {
        let mut list = self.list();
        if list.len() >= MOST_WAITING {
            return false;
        }
        list.push_back(item);
        self.waiting.store(true, Ordering::SeqCst);
        true
    }

    /// Takes out the first one whose time has come, for a vCPU whose handler is `in_progress` or was; `on_stack` says
    /// whether it stands on the handler's stack, if that is known: with MCIP clear nothing is delivered there. What waits for
    /// the end of the handler keeps what is behind it waiting; an error that waits for a mode does not.
    fn next(
        &self,
        in_progress: bool,
        on_stack: impl Fn() -> Result<Option<bool>, KvmError>,
        mode: impl Fn() -> Result<Mode, KvmError>,
    ) -> Result<Next, KvmError> {
        let mut list = self.list();
        let mut ready = None;
        let on_stack = if in_progress || list.is_empty() { None } else { on_stack()? };
        for (index, item) in list.iter_mut().enumerate() {
            match item {
                Waiting::Bystander { since, returns } => {
                    if !on_stack.unwrap_or_else(|| waits_for_handler(*since, returns, in_progress)) {
                        ready = Some(index);
                    }
                    break;
                }
                Waiting::Own(Injection { mode: Some(wanted), .. }) if mode()? != *wanted => {}
                Waiting::Own(_) => {
                    ready = (on_stack != Some(true)).then_some(index);
                    break;
                }
            }
        }
        let next = match ready.and_then(|index| list.remove(index)) {
            Some(item) => Next::Now(item),
            None if list.is_empty() => Next::Nothing,
            None => Next::Later,
        };
        self.waiting.store(!list.is_empty(), Ordering::SeqCst);
        Ok(next)
    }

    /// Takes the bystander's shares out; whether there was one.
    fn take_bystanders(&self) -> bool {
        let mut list = self.list();
        let before = list.len();
        list.retain(|item| matches!(item, Waiting::Own(_)));
        self.waiting.store(!list.is_empty(), Ordering::SeqCst);
        list.len() != before
    }
}

/// Whether a share that was raised at `since` waits for the end of the handler.
fn waits_for_handler(since: Instant, returns: &mut u32, in_progress: bool) -> bool {
    if in_progress {
        *returns = RETURNS;
    }
    let waits = *returns > 0 && since.elapsed() < HANDLER;
    *returns = returns.saturating_sub(1);
    waits
}

struct Shared {
    config: McaConfig,
    queues: Vec<Queue>,
    baton: Arc<Baton>,
    msi: Arc<dyn MsiSink>,
    events: EventBus,
}

/// The way to raise errors in any vCPU, from any thread.
#[derive(Clone)]
pub struct Injector {
    shared: Arc<Shared>,
}

impl fmt::Debug for Injector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Injector").field("queues", &self.shared.queues).finish_non_exhaustive()
    }
}

impl Injector {
    /// An injector for `cpus` vCPUs whose machine-check architecture is `config`, and whose local APICs are reached by
    /// `msi`.
    pub fn new(
        config: McaConfig,
        cpus: u32,
        baton: Arc<Baton>,
        msi: Arc<dyn MsiSink>,
        events: EventBus,
    ) -> Self {
        let queues = (0..cpus).map(|_| Queue::default()).collect();
        Self { shared: Arc::new(Shared { config, queues, baton, msi, events }) }
    }

    /// The machine-check architecture of the guest.
    pub fn config(&self) -> &McaConfig {
        &self.shared.config
    }

    /// Queues an error to vCPU `vcpu`, and gets that vCPU to take it. Without a vCPU it goes to the first one, whose
    /// banks stand for those of the memory controllers.
    ///
    /// What becomes of it is told by an event: `mce_delivered`, `mce_logged` or `mce_shutdown`.
    ///
    /// # Errors
    ///
    /// There is no such vCPU or bank, or too many errors wait already.
    pub fn raise(&self, vcpu: Option<u32>, injection: Injection) -> Result<u32, InjectError> {
        let vcpu = vcpu.unwrap_or(0);
        let count = self.shared.queues.len() as u32;
        let Some(queue) = self.shared.queues.get(vcpu as usize) else {
            return Err(InjectError::NoSuchVcpu { vcpu, count });
        };
        if let What::Record(record) = injection.what
            && record.bank >= self.shared.config.banks()
        {
            let count = self.shared.config.banks();
            return Err(InjectError::NoSuchBank { bank: record.bank, count });
        }
        if !queue.push(Waiting::Own(injection)) {
            return Err(InjectError::Full { vcpu });
        }
        self.shared.baton.kick(vcpu as usize);
        Ok(vcpu)
    }

    /// Whether something waits for vCPU `vcpu`. To be asked after [`Baton::enter`], so that a kick finds either
    /// KVM_RUN or this question still to come.
    pub fn waiting(&self, vcpu: u32) -> bool {
        self.shared.queues.get(vcpu as usize).is_some_and(|queue| queue.waiting.load(Ordering::SeqCst))
    }

    /// Delivers what waits for the calling thread's vCPU, which has left the baton and owes KVM no answer to an exit.
    /// `on_stack` says whether it stands on the stack of its handler of machine checks
    /// ([`Traps::on_machine_check_stack`](super::Traps::on_machine_check_stack)): a second machine check there, after MCIP is
    /// cleared and before the return, would write over the frame of the first.
    pub fn deliver_waiting(
        &self,
        vcpu: &Vcpu,
        mca: &mut McaState,
        on_stack: impl Fn() -> Result<Option<bool>, KvmError>,
    ) -> Result<Turn, KvmError> {
        let Some(queue) = self.shared.queues.get(vcpu.id() as usize) else { return Ok(Turn::Done) };
        if exception_in_flight(&vcpu.events()?) {
            // It may be one that does not come again; the machine check has no place of its own and can wait.
            vcpu.interrupt_within(AGAIN_MS);
            return Ok(Turn::Later);
        }
        loop {
            let delivered = match queue.next(mca.in_progress(), &on_stack, || Mode::of(vcpu))? {
                Next::Nothing => return Ok(Turn::Done),
                Next::Later => {
                    vcpu.interrupt_within(AGAIN_MS);
                    return Ok(Turn::Later);
                }
                Next::Now(Waiting::Own(injection)) => self.deliver(vcpu, mca, injection)?,
                Next::Now(Waiting::Bystander { .. }) => {
                    let raised = mca.raise_bystander(vcpu.sregs()?.cr4);
                    self.carry_out(vcpu, &raised, MceOrigin::Broadcast)?
                }
            };
            // A second machine check meets MCIP, as two at once do on hardware.
            if matches!(delivered, Delivered::Shutdown(_)) {
                return Ok(Turn::Shutdown);
            }
        }
    }

    /// Logs an error in the banks of the calling thread's vCPU, puts its machine check in front of everything else,
    /// and tells the other vCPUs what is their share.
    ///
    /// An interrupt or NMI that was being delivered comes again after the machine check.
    pub fn deliver(
        &self,
        vcpu: &Vcpu,
        mca: &mut McaState,
        injection: Injection,
    ) -> Result<Delivered, KvmError> {
        let cr4 = vcpu.sregs()?.cr4;
        let record = match injection.what {
            What::Error(error) => mca.record(&error, injection.reach),
            What::Record(record) => record,
        };
        let raised = mca.raise_record(record, injection.reach, cr4);
        let delivered = self.carry_out(vcpu, &raised, injection.origin)?;
        if delivered == Delivered::MachineCheck {
            // Who is owed a bystander's share takes both at once, and everybody has been told already.
            let told = self.shared.queues[vcpu.id() as usize].take_bystanders();
            if raised.broadcast && !told {
                self.tell_others(vcpu.id());
            }
        }
        Ok(delivered)
    }

    fn tell_others(&self, culprit: u32) {
        for (id, queue) in self.shared.queues.iter().enumerate().filter(|(id, _)| *id != culprit as usize) {
            if queue.push(Waiting::Bystander { since: Instant::now(), returns: 0 }) {
                self.shared.baton.kick(id);
            } else {
                tracing::warn!(vcpu = id, "a broadcast machine check was lost: too many wait");
            }
        }
    }

    fn carry_out(&self, vcpu: &Vcpu, raised: &Raised, origin: MceOrigin) -> Result<Delivered, KvmError> {
        let id = vcpu.id();
        let &Raised { bank, status, address, misc, mcg_status, .. } = raised;
        let (status, address, misc) = (status.into(), address.into(), misc.into());
        let (delivered, event) = match raised.consequence {
            Consequence::MachineCheck => {
                let gave_way = interrupt_with_machine_check(vcpu, &*self.shared.msi)?;
                let mcg_status = mcg_status.into();
                let event = Event::MceDelivered {
                    vcpu: id,
                    bank,
                    status,
                    address,
                    misc,
                    mcg_status,
                    origin,
                    gave_way,
                };
                (Delivered::MachineCheck, event)
            }
            Consequence::Shutdown(cause) => {
                let event = Event::MceShutdown {
                    vcpu: id,
                    bank,
                    status,
                    address,
                    misc,
                    origin,
                    cause: cause.to_string(),
                };
                (Delivered::Shutdown(cause), event)
            }
            Consequence::Logged | Consequence::CorrectedInterrupt => {
                (Delivered::Logged, Event::MceLogged { vcpu: id, bank, status, address, misc, origin })
            }
        };
        self.shared.events.publish(event);
        Ok(delivered)
    }
}

/// Puts vector 18 in front of whatever was on its way, and wakes the vCPU. The vector of what gave way.
fn interrupt_with_machine_check(vcpu: &Vcpu, msi: &dyn MsiSink) -> Result<Option<u8>, KvmError> {
    let mut events = vcpu.events()?;
    let taken = take_back_events(&mut events);
    if let Some(vector) = taken.interrupt {
        request_again(vcpu, msi, vector)?;
    }
    vcpu.set_events(&events)?;
    if taken.nmi {
        vcpu.request_nmi()?;
    }
    vcpu.wake()?;
    Ok(taken.interrupt.or(taken.nmi.then_some(NMI_VECTOR)).or(taken.exception))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::cpuid::Vendor;
    use crate::x86::mca::ErrorClass;

    struct NoApic;

    impl MsiSink for NoApic {
        fn signal(&self, _address: u64, _data: u32) {}
    }

    fn injector(cpus: u32) -> Injector {
        let config = McaConfig::for_vendor(Vendor::Intel);
        Injector::new(config, cpus, Baton::new(cpus as usize), Arc::new(NoApic), EventBus::new())
    }

    fn request() -> Injection {
        Injection::error(MachineError::line(ErrorClass::Load, 0x1000), MceOrigin::Request)
    }

    #[test]
    fn what_cannot_be_raised_is_named() {
        let injector = injector(2);
        assert_eq!(injector.raise(Some(2), request()), Err(InjectError::NoSuchVcpu { vcpu: 2, count: 2 }));
        let record = BankRecord { bank: 10, status: 1 << 63, address: 0, misc: 0, mcg_status: None };
        let request = Injection::record(record, MceOrigin::Request);
        assert_eq!(
            injector.raise(Some(0), request).unwrap_err().to_string(),
            "There is no machine-check bank 10: the guest has 10, numbered from 0"
        );
        assert!(!injector.waiting(0) && !injector.waiting(7));
    }

    #[test]
    fn a_vcpu_that_does_not_run_is_not_owed_without_bound() {
        let injector = injector(1);
        for _ in 0..MOST_WAITING {
            assert_eq!(injector.raise(None, request()), Ok(0));
        }
        assert_eq!(injector.raise(None, request()), Err(InjectError::Full { vcpu: 0 }));
        assert!(injector.waiting(0));
    }

    #[test]
    fn a_broadcast_reaches_all_others_once() {
        let injector = injector(3);
        injector.tell_others(1);
        assert!(injector.waiting(0) && !injector.waiting(1) && injector.waiting(2));
        assert!(injector.raise(Some(0), request()).is_ok());
        let queue = &injector.shared.queues[0];
        assert!(queue.take_bystanders() && !queue.take_bystanders());
        assert!(injector.waiting(0), "its own error stays");
        assert!(matches!(next(queue, false), Next::Now(Waiting::Own(_))));
        assert!(matches!(next(queue, false), Next::Nothing) && !injector.waiting(0));
    }

    /// What `queue` has for a vCPU that runs in the kernel.
    fn next(queue: &Queue, in_progress: bool) -> Next {
        queue.next(in_progress, || Ok(None), || Ok(Mode::Kernel)).expect("a mode")
    }

    #[test]
    fn only_a_share_waits_for_a_handler_and_not_for_ever() {
        let injector = injector(2);
        let queue = &injector.shared.queues[0];
        injector.tell_others(1);
        assert!(matches!(next(queue, false), Next::Now(Waiting::Bystander { .. })), "there is no handler");
        injector.tell_others(1);
        assert!(matches!(next(queue, true), Next::Later) && matches!(next(queue, true), Next::Later));
        for _ in 1..RETURNS {
            assert!(matches!(next(queue, false), Next::Later), "it has not returned yet");
        }
        assert!(matches!(next(queue, false), Next::Now(Waiting::Bystander { .. })));
        let since = Instant::now().checked_sub(HANDLER).expect("a time before");
        assert!(queue.push(Waiting::Bystander { since, returns: 0 }));
        assert!(matches!(next(queue, true), Next::Now(_)), "it has taken too long");
        injector.raise(Some(0), request()).expect("a vCPU");
        assert!(matches!(next(queue, true), Next::Now(_)), "an error of its own does not wait");
    }

    #[test]
    fn a_share_waits_while_the_stack_of_the_handler_is_in_use() {
        let injector = injector(2);
        let queue = &injector.shared.queues[0];
        let next = |in_progress, on_stack| {
            queue.next(in_progress, || Ok(on_stack), || Ok(Mode::Kernel)).expect("a mode")
        };
        let late = Instant::now().checked_sub(HANDLER).expect("a time before");
        assert!(queue.push(Waiting::Bystander { since: late, returns: 0 }));
        for _ in 0..=RETURNS {
            assert!(
                matches!(next(false, Some(true)), Next::Later),
                "it has not returned, however long that takes"
            );
        }
        assert!(matches!(next(false, Some(false)), Next::Now(Waiting::Bystander { .. })));
        injector.tell_others(1);
        assert!(matches!(next(true, Some(false)), Next::Later), "it is in its handler, on another stack");
        assert!(matches!(next(false, Some(false)), Next::Now(Waiting::Bystander { .. })));
        injector.raise(Some(0), request()).expect("a vCPU");
        assert!(matches!(next(false, Some(true)), Next::Later), "a request waits, too");
        assert!(
            matches!(next(true, Some(true)), Next::Now(Waiting::Own(_))),
            "with MCIP set the processor shuts down"
        );
    }

    #[test]
    fn what_waits_for_a_mode_lets_others_pass() {
        let injector = injector(1);
        let queue = &injector.shared.queues[0];
        let in_user = Injection { mode: Some(Mode::User), ..request() };
        injector.raise(None, in_user).expect("a vCPU");
        assert!(matches!(next(queue, false), Next::Later) && injector.waiting(0));
        injector.raise(None, request()).expect("a vCPU");
        assert!(matches!(next(queue, false), Next::Now(Waiting::Own(Injection { mode: None, .. }))));
        assert!(matches!(
            queue.next(false, || Ok(None), || Ok(Mode::User)),
            Ok(Next::Now(Waiting::Own(Injection { mode: Some(Mode::User), .. })))
        ));
    }
}
