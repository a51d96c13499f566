//! Getting a vCPU thread out of KVM_RUN.
//!
//! A kick is a signal whose handler sets `immediate_exit` of the thread's own vCPU: it works whether the
//! thread is in KVM_RUN, about to enter it, or elsewhere, and no kick is lost between.

use std::cell::Cell;
use std::io;
use std::sync::Once;

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    IMMEDIATE_EXIT.with(|cell| {
        let flag = cell.get();
        if !flag.is_null() {
            // SAFETY: `Kick::for_this_thread` demands that the pointer stays valid for as long as it is
            // registered, and it is this thread's own.
            unsafe { flag.write_volatile(1) };
        }
    });
}

fn signal() -> libc::c_int {
    SIGRTMIN()
}

/// The handle by which other threads kick one vCPU thread.
#[derive(Clone, Copy, Debug)]
pub struct Kick {
    thread: libc::pthread_t,
}

impl Kick {
    /// Prepares the calling thread, whose vCPU's `immediate_exit` byte is at `flag`.
    ///
    /// # Safety
    ///
    /// `flag` stays valid until [`Kick::forget_this_thread`] is called on the same thread.
    pub unsafe fn for_this_thread(flag: *mut u8) -> io::Result<Self> {
        static HANDLER: Once = Once::new();
        let mut result = Ok(());
        HANDLER.call_once(|| {
            result = register_signal_handler(signal(), on_kick)
                .map_err(|e| io::Error::from_raw_os_error(e.errno()));
        });
        result?;
        IMMEDIATE_EXIT.with(|cell| cell.set(flag));
        // SAFETY: always succeeds and has no preconditions.
        Ok(Self { thread: unsafe { libc::pthread_self() } })
    }

    /// Ends the preparation of the calling thread.
    pub fn forget_this_thread() {
        IMMEDIATE_EXIT.with(|cell| cell.set(std::ptr::null_mut()));
    }

    /// Makes the thread's KVM_RUN, this one or the next, return EINTR.
    ///
    /// # Safety
    ///
    /// The thread has not ended.
    pub unsafe fn send(&self) {
        // SAFETY: the caller vouches that the thread exists; the handler is installed.
        unsafe { libc::pthread_kill(self.thread, signal()) };
    }
}

/// A timer that kicks the thread that made it, to bound a single step.
#[derive(Debug)]
pub struct KickTimer {
    timer: libc::timer_t,
}

// SAFETY: a timer id is a number to the kernel, valid in every thread of the process.
unsafe impl Send for KickTimer {}

impl KickTimer {
    /// A timer for the calling thread, not yet armed.
    pub fn new() -> io::Result<Self> {
        let mut timer = std::ptr::null_mut();
        // SAFETY: a zeroed sigevent is valid, and its fields are set before use.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal();
        // SAFETY: gettid has no preconditions.
        event.sigev_notify_thread_id = unsafe { libc::gettid() };
        // SAFETY: both pointers are to live locals.
        if unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { timer })
    }

    /// Kicks in `milliseconds`; 0 disarms.
    pub fn arm(&self, milliseconds: u32) {
        let spec = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: libc::timespec {
                tv_sec: i64::from(milliseconds / 1000),
                tv_nsec: i64::from(milliseconds % 1000) * 1_000_000,
            },
        };
        // SAFETY: the timer is ours and lives; the old value is not asked for.
        unsafe { libc::timer_settime(self.timer, 0, &spec, std::ptr::null_mut()) };
    }
}

impl Drop for KickTimer {
    fn drop(&mut self) {
        // SAFETY: ours, deleted once.
        unsafe { libc::timer_delete(self.timer) };
    }
}
