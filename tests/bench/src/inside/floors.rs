//! What KVM and the system themselves cost: no monitor can be faster. A tiny guest in real mode does what is measured.

use anyhow::{Context, Result, bail};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const ROUNDS: usize = 10;
/// Machines that are made: taking one down waits for the kernel.
const MACHINES: usize = 5;
const REPEAT: u64 = 200;
const PAGE: u64 = 4096;
/// Memory of the guest.
const RAM: u64 = 16 * PAGE;
const CODE: u64 = 0x1000;
/// A page that is protected.
const GUARDED: u64 = 0x8000;
/// An address with nothing behind it.
const NOTHING: u64 = 0x10_0000;
/// Where a slot comes and goes.
const SLOT: u64 = 0x100_0000;
const PORT: u8 = 0x80;
const EVENT_PORT: u8 = 0x90;

/// `out PORT, al` for ever.
const PORT_LOOP: &[u8] = &[0xe6, PORT, 0xeb, 0xfc];
/// `mov al, [bx]` for ever.
const LOAD_LOOP: &[u8] = &[0x8a, 0x07, 0xeb, 0xfc];
/// `mov [bx], al` for ever.
const STORE_LOOP: &[u8] = &[0x88, 0x07, 0xeb, 0xfc];
/// `REPEAT` times `out EVENT_PORT, al`, then `out PORT, al`; for ever.
const EVENT_LOOP: &[u8] = &[0xb9, REPEAT as u8, 0x00, 0xe6, EVENT_PORT, 0xe2, 0xfc, 0xe6, PORT, 0xeb, 0xf5];

/// Nanoseconds by name; the shortest of many.
pub fn measure() -> Result<BTreeMap<String, f64>> {
    let mut floors = BTreeMap::new();
    let mut note = |name: &str, value: f64| floors.insert(name.to_owned(), value);
    let kvm = Kvm::new().context("Cannot open /dev/kvm")?;
    let (machine, first_run) = creation(&kvm)?;
    note("vm+vcpu+slot", machine);
    note("first run", first_run);
    note(
        "trivial ioctl",
        best(
            || REPEAT,
            || {
                std::hint::black_box(kvm.check_extension(Cap::Irqchip));
            },
        )?,
    );

    let mut guest = Guest::new(&kvm)?;
    guest.set(PORT_LOOP, 0)?;
    note("port exit", guest.runs(|exit| matches!(exit, Ok(VcpuExit::IoOut(..))))?);
    guest.set(LOAD_LOOP, NOTHING)?;
    note("mmio exit (read)", guest.runs(|exit| matches!(exit, Ok(VcpuExit::MmioRead(..))))?);
    guest.set(STORE_LOOP, NOTHING)?;
    note("mmio exit (write)", guest.runs(|exit| matches!(exit, Ok(VcpuExit::MmioWrite(..))))?);
    let event = EventFd::new(libc::EFD_NONBLOCK)?;
    guest.vm.register_ioevent(&event, &IoEventAddress::Pio(EVENT_PORT.into()), NoDatamatch)?;
    guest.set(EVENT_LOOP, 0)?;
    note("ioeventfd", guest.runs(|exit| matches!(exit, Ok(VcpuExit::IoOut(..))))? / REPEAT as f64);
    guest.protect(libc::PROT_NONE)?;
    guest.set(LOAD_LOOP, GUARDED)?;
    note("efault exit", guest.runs(|exit| matches!(exit, Err(error) if error.errno() == libc::EFAULT))?);
    let mut open = false;
    let protect = best(
        || REPEAT,
        || {
            open = !open;
            // An error shows in the next run of the guest.
            let _ = guest.protect(if open { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE });
        },
    )?;
    note("mprotect", protect);
    let (add, delete) = guest.slots()?;
    note("memslot add", add);
    note("memslot delete", delete);
    note("socket pair round trip", socket_pair()? as f64);
    Ok(floors)
}

/// The shortest of several rounds of `count()` calls each, in nanoseconds a call.
fn best(count: impl Fn() -> u64, mut call: impl FnMut()) -> Result<f64> {
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..count() {
            call();
        }
        best = best.min(start.elapsed().as_nanos() as f64 / count() as f64);
    }
    Ok(best)
}

/// A machine with one processor and one page of memory: made, and run for the first time.
fn creation(kvm: &Kvm) -> Result<(f64, f64)> {
    let (mut made, mut run) = (f64::MAX, f64::MAX);
    for _ in 0..MACHINES {
        let start = Instant::now();
        let mut guest = Guest::new(kvm)?;
        made = made.min(start.elapsed().as_nanos() as f64);
        guest.set(PORT_LOOP, 0)?;
        let start = Instant::now();
        guest.vcpu.run()?;
        run = run.min(start.elapsed().as_nanos() as f64);
    }
    Ok((made, run))
}

struct Guest {
    // Dropped in this order: the processor and the machine before the memory that they use.
    vcpu: VcpuFd,
    vm: VmFd,
    memory: GuestMemoryMmap,
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)])?;
        let vm = kvm.create_vm()?;
        let host = memory.get_host_address(GuestAddress(0))? as u64;
        slot(&vm, 0, 0, RAM, host)?;
        let vcpu = vm.create_vcpu(0)?;
        Ok(Guest { vcpu, vm, memory })
    }

    /// Puts `code` in front of the processor, with `data` as its data segment.
    fn set(&mut self, code: &[u8], data: u64) -> Result<()> {
        // What the last exit left to do is done by the next run, and must not meet the new code.
        self.vcpu.set_kvm_immediate_exit(1);
        let _ = self.vcpu.run();
        self.vcpu.set_kvm_immediate_exit(0);
        self.memory.write_slice(code, GuestAddress(CODE))?;
        let mut sregs = self.vcpu.get_sregs()?;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        sregs.ds.base = data;
        sregs.ds.selector = (data >> 4) as u16;
        self.vcpu.set_sregs(&sregs)?;
        let mut regs = self.vcpu.get_regs()?;
        (regs.rip, regs.rbx, regs.rflags) = (CODE, 0, 2);
        self.vcpu.set_regs(&regs)?;
        Ok(())
    }

    /// Nanoseconds of a run that ends as `expected` says.
    fn runs(
        &mut self,
        expected: impl Fn(&std::result::Result<VcpuExit, kvm_ioctls::Error>) -> bool,
    ) -> Result<f64> {
        let mut odd = None;
        let shortest = best(
            || REPEAT,
            || {
                let exit = self.vcpu.run();
                if !expected(&exit) {
                    odd = Some(format!("{exit:?}"));
                }
            },
        )?;
        match odd {
            Some(exit) => bail!("The guest of the floors ended with {exit}"),
            None => Ok(shortest),
        }
    }

    fn protect(&self, prot: libc::c_int) -> Result<()> {
        let page = self.memory.get_host_address(GuestAddress(GUARDED))?;
        // SAFETY: a page of our own map; only the guest and `write_slice`, elsewhere, use that map.
        if unsafe { libc::mprotect(page.cast(), PAGE as usize, prot) } < 0 {
            bail!("Cannot protect a page: {}", std::io::Error::last_os_error());
        }
        Ok(())
    }

    /// Adding and deleting a slot.
    fn slots(&self) -> Result<(f64, f64)> {
        let host = self.memory.get_host_address(GuestAddress(0))? as u64;
        let (mut add, mut delete) = (f64::MAX, f64::MAX);
        for _ in 0..ROUNDS {
            let start = Instant::now();
            slot(&self.vm, 1, SLOT, PAGE, host)?;
            add = add.min(start.elapsed().as_nanos() as f64);
            let start = Instant::now();
            slot(&self.vm, 1, SLOT, 0, host)?;
            delete = delete.min(start.elapsed().as_nanos() as f64);
        }
        Ok((add, delete))
    }
}

fn slot(vm: &VmFd, slot: u32, guest_phys_addr: u64, memory_size: u64, userspace_addr: u64) -> Result<()> {
    let region = kvm_userspace_memory_region { slot, flags: 0, guest_phys_addr, memory_size, userspace_addr };
    // SAFETY: the map behind the slot outlives the machine (see the order of `Guest`).
    Ok(unsafe { vm.set_user_memory_region(region) }?)
}

/// A byte to another thread and back over a pair of sockets, in nanoseconds.
pub fn socket_pair() -> Result<u64> {
    let (mut here, mut there) = UnixStream::pair()?;
    let echo = std::thread::spawn(move || {
        let mut byte = [0];
        while there.read(&mut byte).is_ok_and(|count| count > 0) && there.write_all(&byte).is_ok() {}
    });
    let mut shortest = u64::MAX;
    for _ in 0..ROUNDS as u64 * 10 {
        let start = Instant::now();
        here.write_all(&[1])?;
        here.read_exact(&mut [0])?;
        shortest = shortest.min(start.elapsed().as_nanos() as u64);
    }
    drop(here);
    // It ends with the connection; a panic in it has been printed.
    let _ = echo.join();
    Ok(shortest)
}
