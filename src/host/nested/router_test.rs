use super::*;
use aconite_agent::protocol::{Exec, ExitStatus, Power, Stream};

fn exec() -> Message {
    Message::Exec(Exec { argv: vec![b"true".to_vec()], ..Exec::default() })
}

fn frame(channel: u32, message: Message) -> Frame {
    Frame { channel, message }
}

fn opened(router: &mut Router, client: ClientId, own: u32, message: Message) -> u32 {
    match router.from_client(client, frame(own, message)) {
        Some(Route::Agent(frame)) => frame.channel,
        other => panic!("not passed on: {other:?}"),
    }
}

#[test]
fn two_clients_use_the_same_number() {
    let mut router = Router::default();
    let a = opened(&mut router, 1, 7, exec());
    let b = opened(&mut router, 2, 7, exec());
    assert_ne!(a, b);
    let data = Message::Data(Stream::Stdout, b"x".to_vec());
    assert_eq!(router.from_agent(frame(b, data.clone())), Some(Route::Client(2, frame(7, data.clone()))));
    assert_eq!(router.from_agent(frame(a, data.clone())), Some(Route::Client(1, frame(7, data))));
    let input = Message::Data(Stream::Stdin, b"y".to_vec());
    assert_eq!(router.from_client(1, frame(7, input.clone())), Some(Route::Agent(frame(a, input))));
}

#[test]
fn an_ended_number_is_free_again() {
    let mut router = Router::default();
    let first = opened(&mut router, 1, 7, exec());
    let end = Message::Exit(ExitStatus::Code(3));
    assert_eq!(router.from_agent(frame(first, end.clone())), Some(Route::Client(1, frame(7, end))));
    assert!(router.is_empty());
    assert_eq!(router.from_client(1, frame(7, Message::Close)), None, "crossed with the end");
    assert_eq!(router.from_agent(frame(first, Message::Eof(Stream::Stdout))), None);
    assert_ne!(opened(&mut router, 1, 7, exec()), first);
}

#[test]
fn a_number_in_use_is_not_opened_twice() {
    let mut router = Router::default();
    opened(&mut router, 1, 7, exec());
    assert_eq!(router.from_client(1, frame(7, exec())), None);
}

#[test]
fn clients_do_not_end_the_machine() {
    let mut router = Router::default();
    let route = router.from_client(1, frame(7, Message::Power(Power::Off)));
    assert!(
        matches!(route, Some(Route::Client(1, Frame { channel: 7, message: Message::Failed { .. } }))),
        "{route:?}"
    );
    assert!(matches!(router.from_client(1, frame(0, exec())), Some(Route::Client(1, _))));
    assert!(router.is_empty());
}

#[test]
fn commands_of_a_client_that_went_are_told_and_then_ended() {
    let mut router = Router::default();
    let command = opened(&mut router, 1, 1, exec());
    let connection = opened(&mut router, 1, 2, Message::Connect(b"/s".to_vec()));
    let other = opened(&mut router, 2, 1, exec());
    let now = Instant::now();
    let routes = router.client_gone(1, now);
    assert_eq!(
        routes,
        [
            Route::Agent(frame(command, Message::Signal(libc::SIGTERM))),
            Route::Agent(frame(connection, Message::Close))
        ]
    );
    // Its last words are taken, so that it can end.
    let words = Message::Data(Stream::Stderr, vec![0; 100]);
    assert_eq!(
        router.from_agent(frame(command, words)),
        Some(Route::Agent(frame(command, Message::Credit(Stream::Stderr, 100))))
    );
    assert_eq!(router.expire(now), []);
    assert_eq!(router.next_deadline(), Some(now + GRACE));
    assert_eq!(router.expire(now + GRACE), [Route::Agent(frame(command, Message::Close))]);
    assert_eq!(router.next_deadline(), None);
    assert!(!router.is_empty());
    for number in [command, connection] {
        assert_eq!(router.from_agent(frame(number, Message::Exit(ExitStatus::Code(0)))), None);
    }
    assert!(!router.is_empty(), "the other client's command runs on");
    assert_eq!(router.agent_gone("gone").len(), 1);
    assert!(router.is_empty());
    let _ = other;
}

#[test]
fn numbers_go_round_past_those_in_use() {
    let mut router = Router { last: u32::MAX - 1, ..Router::default() };
    assert_eq!(opened(&mut router, 1, 1, exec()), u32::MAX);
    assert_eq!(opened(&mut router, 1, 2, exec()), 1, "0 is the session");
    router.last = u32::MAX - 1;
    assert_eq!(opened(&mut router, 1, 3, exec()), 2);
}
