use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};

use aconite_devices::bus::DeviceId;
use aconite_devices::dma::{Dma, NoPoison};
use aconite_devices::irq::MsiSink;
use aconite_devices::pci::PciFunction;
use aconite_devices::virtio::{QueueError, Queues, VirtioDevice, Wiring};
use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

use super::*;

/// How long a test waits for what must come, and for what must not.
const SOON: Duration = Duration::from_secs(20);
const NEVER: Duration = Duration::from_millis(50);

/// What the device sees.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Notified(u16),
    Finished(u16),
    Called,
}

/// A device whose notifications are jobs: as many as the number of the queue.
struct Probe {
    backend: Workers<u16>,
    seen: Sender<Seen>,
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u16 {
        0x2a
    }
    fn class(&self) -> u32 {
        0
    }
    fn features(&self) -> u64 {
        0
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16; 4]
    }
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    fn activate(&mut self, _features: u64) {}
    fn reset(&mut self) {}
    fn process_queue(&mut self, index: u16, _queues: &mut Queues<'_>) -> Result<(), QueueError> {
        self.seen.send(Seen::Notified(index)).unwrap();
        (0..index).for_each(|job| self.backend.start(job));
        Ok(())
    }
    fn host_ready(&mut self, _queues: &mut Queues<'_>) -> Result<(), QueueError> {
        Ok(())
    }
}

impl Worked for Probe {
    type Job = u16;
    type Done = u16;
    fn finished(&mut self, done: u16) {
        self.seen.send(Seen::Finished(done)).unwrap();
    }
    fn clock_struck(&mut self) {
        self.seen.send(Seen::Called).unwrap();
    }
}

struct Nowhere;

impl MsiSink for Nowhere {
    fn signal(&self, _address: u64, _data: u32) {}
}

/// A device that runs, and its workers.
struct Bench {
    seen: Receiver<Seen>,
    workers: Workers<u16>,
    now: Arc<AtomicU64>,
    _pool: Pool<u16>,
}

impl Bench {
    /// `count` workers that do jobs by `perform`.
    fn new(count: usize, perform: impl FnMut(&u16) -> u16 + Clone + Send + 'static) -> Self {
        let now = Arc::new(AtomicU64::new(0));
        let hand = now.clone();
        let clock: Clock = Arc::new(move || Duration::from_millis(hand.load(Ordering::Relaxed)));
        let workers = Workers::new(clock).unwrap();
        let (sender, seen) = mpsc::channel();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let dma = Dma::new(GuestMemoryAtomic::new(memory), Arc::new(NoPoison));
        let wiring = Wiring { id: DeviceId(1), dma, msi: Arc::new(Nowhere), express: None };
        let probe = Probe { backend: workers.clone(), seen: sender };
        let function = Arc::new(Mutex::new(VirtioPci::new(probe, wiring).unwrap()));
        let mut effects = Effects::new();
        lock(&function).config_write(4, &[6, 0], &mut effects);
        // VIRTIO_F_VERSION_1, then the status up to DRIVER_OK.
        for (at, value) in [(0x14, &[3][..]), (0x08, &[1, 0, 0, 0]), (0x0c, &[1, 0, 0, 0]), (0x14, &[0xf])] {
            lock(&function).bar_write(0, at, value, &mut effects);
        }
        assert!(effects.is_empty());
        let send = Outbox::new(|effects| assert!(effects.is_empty()));
        let pool = Pool::start("test", workers.clone(), count, &function, perform, &send).unwrap();
        Self { seen, workers, now, _pool: pool }
    }

    fn next(&self) -> Seen {
        self.seen.recv_timeout(SOON).unwrap()
    }
}

#[test]
fn every_ring_has_a_worker_look_into_the_queue() {
    let bench = Bench::new(3, |job| *job);
    let bells = [0, 1].map(|queue| bench.workers.bell(queue).unwrap());
    for _ in 0..100 {
        bells[0].write(1).unwrap();
        assert_eq!(bench.next(), Seen::Notified(0));
        bells[1].write(1).unwrap();
        assert_eq!([bench.next(), bench.next()], [Seen::Notified(1), Seen::Finished(0)]);
    }
    drop(bells);
    bench.workers.clone().start(7);
    assert_eq!(bench.next(), Seen::Finished(7), "the jobs of others are done too");
}

#[test]
fn jobs_that_come_together_are_done_by_all() {
    let together = Arc::new(Barrier::new(3));
    let bench = Bench::new(3, move |job| {
        together.wait();
        *job
    });
    let bell = bench.workers.bell(3).unwrap();
    for _ in 0..100 {
        bell.write(1).unwrap();
        assert_eq!(bench.next(), Seen::Notified(3));
        let mut done = [bench.next(), bench.next(), bench.next()].map(|seen| match seen {
            Seen::Finished(job) => job,
            other => panic!("{other:?}"),
        });
        done.sort_unstable();
        assert_eq!(done, [0, 1, 2]);
    }
}

#[test]
fn the_device_is_called_when_its_time_has_come_and_not_before() {
    let bench = Bench::new(2, |job| *job);
    let mut backend = bench.workers.clone();
    backend.call_at(Duration::from_millis(30));
    assert!(bench.seen.recv_timeout(NEVER).is_err(), "the clock stands still");
    bench.now.store(30, Ordering::Relaxed);
    assert_eq!(bench.next(), Seen::Called);
    backend.call_at(Duration::from_millis(10));
    assert_eq!(bench.next(), Seen::Called, "it is past");
    assert!(bench.seen.recv_timeout(NEVER).is_err());
}

#[test]
fn a_call_is_not_missed_while_another_worker_is_busy() {
    let (release, held) = mpsc::channel::<()>();
    let held = Arc::new(Mutex::new(held));
    let bench = Bench::new(2, move |job| {
        let _ = held.lock().unwrap().recv();
        *job
    });
    let mut backend = bench.workers.clone();
    backend.call_at(Duration::from_millis(5));
    backend.start(1);
    bench.now.store(5, Ordering::Relaxed);
    assert_eq!(bench.next(), Seen::Called);
    release.send(()).unwrap();
    assert_eq!(bench.next(), Seen::Finished(1));
}
