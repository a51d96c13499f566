//! Tests of the event stream.

use std::thread;
use std::time::UNIX_EPOCH;

use proptest::prelude::*;

use super::*;

fn number(event: u32) -> Event {
    Event::MachineStarted { vcpus: event }
}

fn drain(subscription: &mut Subscription) -> Vec<Event> {
    let mut events = Vec::new();
    while let Next::Record(record) = subscription.next(Duration::ZERO) {
        events.push(record.event.clone());
    }
    events
}

#[test]
fn readers_see_all_in_order_from_where_they_began() {
    let bus = EventBus::new();
    for event in 1..=5 {
        assert_eq!(bus.publish(number(event)), u64::from(event));
    }
    assert_eq!(drain(&mut bus.subscribe(0)), (1..=5).map(number).collect::<Vec<_>>());
    assert_eq!(drain(&mut bus.subscribe(3)), [number(4), number(5)]);
    assert_eq!(drain(&mut bus.subscribe(bus.last())), []);
    assert_eq!(bus.subscribe(u64::MAX).next(Duration::ZERO), Next::Nothing);
}

#[test]
fn a_slow_reader_is_told_exactly_what_it_missed() {
    let bus = EventBus::with_history(4);
    let mut slow = bus.subscribe(0);
    bus.publish(number(1));
    assert!(matches!(slow.next(Duration::ZERO), Next::Record(record) if record.seq == 1));
    for event in 2..=10 {
        bus.publish(number(event));
    }
    let Next::Record(gap) = slow.next(Duration::ZERO) else { panic!("a gap was expected") };
    assert_eq!(gap.event, Event::EventsLost { count: 5, first: 2 });
    assert_eq!(gap.seq, 6);
    assert_eq!(drain(&mut slow), (7..=10).map(number).collect::<Vec<_>>());
}

#[test]
fn a_closed_stream_gives_out_what_is_left() {
    let bus = EventBus::new();
    bus.publish(number(1));
    let mut reader = bus.subscribe(0);
    bus.close();
    bus.publish(number(2));
    assert!(matches!(reader.next(Duration::ZERO), Next::Record(_)));
    assert_eq!(reader.next(Duration::from_secs(60)), Next::Closed);
}

#[test]
fn waiting_readers_wake_up() {
    let bus = EventBus::new();
    let mut reader = bus.subscribe(0);
    let waiting =
        thread::spawn(move || reader.wait_for(Duration::from_secs(60), |event| *event == number(2)));
    bus.publish(number(1));
    bus.publish(number(2));
    assert_eq!(waiting.join().unwrap().unwrap().seq, 2);
    let mut reader = bus.subscribe(2);
    assert_eq!(reader.wait_for(Duration::from_millis(5), |_| true), None);
}

#[test]
fn writers_on_many_threads_lose_nothing() {
    let bus = EventBus::new();
    let writers: Vec<_> = (0..4)
        .map(|_| {
            let bus = bus.clone();
            thread::spawn(move || {
                for event in 0..1000 {
                    bus.publish(number(event));
                }
            })
        })
        .collect();
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    let mut reader = bus.subscribe(0);
    for seq in 1..=4000 {
        assert!(matches!(reader.next(Duration::ZERO), Next::Record(record) if record.seq == seq));
    }
}

#[test]
fn times_as_dates() {
    let at = |seconds: u64| rfc3339(UNIX_EPOCH + Duration::from_micros(seconds * 1_000_000 + 42));
    assert_eq!(at(0), "1970-01-01T00:00:00.000042Z");
    assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000042Z");
    assert_eq!(at(1_709_251_199), "2024-02-29T23:59:59.000042Z");
    assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00.000042Z");
}

#[test]
fn records_are_flat_json() {
    let bus = EventBus::new();
    bus.publish(Event::StaleAccess {
        device: "p0".into(),
        offset: 0x1000.into(),
        access: super::super::Access {
            vcpu: 1,
            rip: 0xffff_ffff_8100_0000.into(),
            cr3: 0x1000.into(),
            cpl: 3,
            va: Some(0x7f00_0000_0000.into()),
            gpa: 0x1_4000_1000.into(),
            bytes: 8,
            direction: super::super::Direction::Read,
            instruction: None,
            instruction_bytes: None,
        },
        count: 1,
    });
    let Next::Record(record) = bus.subscribe(0).next(Duration::ZERO) else { panic!("an event was expected") };
    let json = serde_json::to_value(&*record).unwrap();
    assert_eq!(json["event"], "stale_access");
    assert_eq!(json["rip"], "0xffffffff81000000");
    assert_eq!(json["direction"], "read");
    assert_eq!(json["seq"], 1);
    assert_eq!(serde_json::from_value::<Record>(json).unwrap(), *record);
}

proptest! {
    /// Whatever the order of writing and reading, a reader sees each event once, in order, or in the count of a gap.
    #[test]
    fn every_event_is_seen_or_counted(capacity in 1usize..8, steps in prop::collection::vec((any::<bool>(), 1usize..12), 0..40)) {
        let bus = EventBus::with_history(capacity);
        let mut reader = bus.subscribe(0);
        let mut next = 1;
        for (write, count) in steps {
            for _ in 0..count {
                if write {
                    bus.publish(number(0));
                } else if let Next::Record(record) = reader.next(Duration::ZERO) {
                    if let Event::EventsLost { count, first } = record.event {
                        prop_assert_eq!(first, next);
                        prop_assert!(count > 0 && bus.last() - record.seq == capacity as u64);
                    } else {
                        prop_assert_eq!(record.seq, next);
                    }
                    next = record.seq + 1;
                } else {
                    prop_assert_eq!(next, bus.last() + 1);
                }
            }
        }
    }
}
