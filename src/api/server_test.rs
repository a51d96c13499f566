//! Tests of the server on a real socket: what it answers, and what it does not let a client do.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};

use super::fake::FakeMachine;
use super::*;
use crate::command::{ErrorCode, Event};

/// A server with a fake machine behind it.
struct Fixture {
    server: Option<Server>,
    machine: Arc<FakeMachine>,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        Self::with(Limits::default(), EventBus::new())
    }

    fn with(limits: Limits, bus: EventBus) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.sock");
        let machine = Arc::new(FakeMachine::new(bus));
        let server = Server::start_with(&path, machine.clone(), limits).unwrap();
        Self { server: Some(server), machine, path, _dir: dir }
    }

    fn client(&self) -> Client {
        Client::new(&self.path)
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Sends bytes on a connection of their own and reads until the server ends it.
    fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    fn started(&self, count: u32) {
        for vcpus in 1..=count {
            self.machine.events().publish(Event::MachineStarted { vcpus });
        }
    }
}

/// Reads one reply with a content length: status and body.
fn read_reply(reader: &mut impl BufRead) -> (u16, Value) {
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let status = line.split(' ').nth(1).unwrap().parse().unwrap();
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line == "\r\n" {
            break;
        }
        if let Some(text) = line.strip_prefix("Content-Length: ") {
            length = text.trim().parse().unwrap();
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    (status, serde_json::from_slice(&body).unwrap())
}

fn refused(result: Result<Answer, ClientError>) -> crate::command::Error {
    match result {
        Err(ClientError::Refused(error)) => error,
        other => panic!("a refusal was expected: {other:?}"),
    }
}

#[test]
fn replies_carry_the_number_of_the_event_before() {
    let fixture = Fixture::new();
    fixture.started(3);
    let info = fixture.client().call("GET", "/v1/machine", None).unwrap();
    assert_eq!((info.status, &info.body["seq"], &info.body["vcpus"]), (200, &json!(3), &json!(2)));
    let body = json!({"ranges": [{"offset": "0x200040", "length": 64}]});
    let added = fixture.client().call("POST", "/v1/memory/p0/poison", Some(&body)).unwrap().body;
    assert_eq!(added["seq"], 3, "the event of the poison itself comes after");
    assert_eq!(added["armed"], json!([{"offset": "0x200000", "length": 4096}]));
    assert_eq!((&added["granularity"], &added["rounded"]), (&json!(4096), &json!(true)));
    let events: Vec<_> =
        fixture.client().events(3, false).unwrap().map(|record| record.unwrap().event).collect();
    assert!(matches!(&events[..], [Event::PoisonAdded { device, .. }] if device == "p0"), "{events:?}");
    let cleared = fixture.client().call("DELETE", "/v1/memory/p0/poison", None).unwrap().body;
    assert!(cleared["note"].as_str().unwrap().contains("the guest's own list of bad blocks stays"));
}

#[test]
fn refusals_have_code_message_and_remedy() {
    let fixture = Fixture::new();
    let client = fixture.client();
    let error = refused(client.call("GET", "/v1/memory/p7", None));
    assert_eq!(error.code, ErrorCode::NoSuchDevice);
    assert_eq!(error.to_string(), "There is no device \"p7\"; name one of: p0");
    let body = json!({"ranges": [{"offset": "0x3fffffff", "length": 2}]});
    let error = refused(client.call("POST", "/v1/memory/p0/poison", Some(&body)));
    assert_eq!(error.code, ErrorCode::OutsideDevice);
    let error = refused(client.call("POST", "/v1/memory/p0/poison", Some(&json!({"range": 1}))));
    assert_eq!(error.code, ErrorCode::BadJson);
    assert!(error.message.contains("unknown variant `range`, expected one of `ranges`"), "{error}");
    let text = fixture.raw(b"PUT /v1/machine HTTP/1.1\r\nConnection: close\r\n\r\n");
    assert!(
        text.starts_with("HTTP/1.1 405 Method Not Allowed\r\n") && text.contains("\r\nAllow: GET\r\n"),
        "{text}"
    );
}

#[test]
fn head_is_answered_without_a_body() {
    let fixture = Fixture::new();
    let text = fixture
        .raw(b"HEAD /v1/machine HTTP/1.1\r\n\r\nGET /v1/machine HTTP/1.1\r\nConnection: close\r\n\r\n");
    let (head, machine) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 405 ") && machine.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
}

#[test]
fn malformed_json() {
    let fixture = Fixture::new();
    let text = fixture.raw(
        b"POST /v1/memory/p0/poison HTTP/1.1\r\nConnection: close\r\nContent-Length: 9\r\n\r\n{\"ranges\"",
    );
    assert!(text.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{text}");
    assert!(text.contains("\"code\":\"bad_json\"") && text.contains("is no JSON"), "{text}");
}

#[test]
fn a_body_of_a_gibibyte_is_refused_before_it_is_sent() {
    let fixture = Fixture::new();
    let start = Instant::now();
    let text = fixture.raw(b"POST /v1/memory HTTP/1.1\r\nContent-Length: 1073741824\r\n\r\n");
    assert!(text.starts_with("HTTP/1.1 413 Content Too Large\r\n"), "{text}");
    assert!(text.contains("\"code\":\"body_too_large\"") && text.contains("1073741824"), "{text}");
    assert!(start.elapsed() < Duration::from_secs(5));
    let text = fixture.raw(b"POST /v1/memory HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n4000\r\n");
    assert!(text.starts_with("HTTP/1.1 411 Length Required\r\n"), "{text}");
    let text = fixture.raw(format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(20 << 10)).as_bytes());
    assert!(text.starts_with("HTTP/1.1 431 "), "{text}");
    let text = fixture.raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 this is TLS\r\n\r\n");
    assert!(text.starts_with("HTTP/1.1 400 ") && text.contains("bad_http"), "{text}");
}

#[test]
fn a_slow_client_is_answered() {
    let fixture = Fixture::new();
    let mut slow = fixture.connect();
    for byte in b"GET /v1/machine HTTP/1.1\r\n\r\n" {
        slow.write_all(&[*byte]).unwrap();
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(read_reply(&mut BufReader::new(&slow)).0, 200);
}

#[test]
fn a_stuck_client_is_given_up_and_holds_up_nobody() {
    let limits = Limits { request: Duration::from_millis(400), ..Limits::default() };
    let fixture = Fixture::with(limits, EventBus::new());
    let mut stuck = fixture.connect();
    stuck.write_all(b"POST /v1/memory HTTP/1.1\r\nContent-Length: 100\r\n\r\n{").unwrap();
    fixture.client().call("GET", "/v1/machine", None).unwrap();
    let mut text = String::new();
    stuck.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 408 ") && text.contains("request_timeout"), "{text}");
}

#[test]
fn idle_connections_are_closed() {
    let limits = Limits { idle: Duration::from_millis(50), ..Limits::default() };
    let fixture = Fixture::with(limits, EventBus::new());
    assert_eq!(fixture.raw(b""), "");
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let fixture = Fixture::new();
    let body = r#"{"kind": "health"}"#;
    let requests = format!(
        "GET /v1/machine HTTP/1.1\r\n\r\n\
         POST /v1/memory/p0/notify HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}\
         GET /v1/nothing HTTP/1.1\r\n\r\n\
         GET /v1/memory HTTP/1.1\r\nConnection: close\r\n\r\nGET /v1/never HTTP/1.1\r\n\r\n",
        body.len()
    );
    let mut stream = fixture.connect();
    stream.write_all(requests.as_bytes()).unwrap();
    let mut reader = BufReader::new(&stream);
    let replies: Vec<(u16, Value)> = (0..4).map(|_| read_reply(&mut reader)).collect();
    let states: Vec<u16> = replies.iter().map(|(status, _)| *status).collect();
    assert_eq!(states, [200, 200, 404, 200]);
    assert_eq!(replies[3].1["memory"][0]["id"], "p0");
    assert_eq!(replies[3].1["seq"], 1, "the notification was event 1");
    let mut rest = String::new();
    // What comes after "Connection: close" is not looked at; its bytes may end the connection with a reset.
    let _ = reader.read_to_string(&mut rest);
    assert_eq!(rest, "");
}

#[test]
fn events_as_they_happen_and_from_before() {
    let fixture = Fixture::new();
    fixture.started(2);
    let mut events = fixture.client().events(1, true).unwrap();
    assert_eq!(events.next().unwrap().unwrap().seq, 2);
    fixture.started(1);
    assert_eq!(events.next().unwrap().unwrap().seq, 3);
    fixture.machine.events().publish(Event::PoweredOff);
    fixture.machine.events().close();
    assert_eq!(events.next().unwrap().unwrap().event, Event::PoweredOff);
    assert!(events.next().is_none(), "the stream ends with the machine");
}

#[test]
fn a_reader_that_was_too_slow_is_told_how_much_it_missed() {
    let fixture = Fixture::with(Limits::default(), EventBus::with_history(10));
    let events = fixture.client().events(0, true).unwrap();
    let mut events = events.map(|record| record.unwrap());
    fixture.started(1);
    assert_eq!(events.next().unwrap().seq, 1);
    // Far more than the socket holds: the server's writer waits, and the history runs away from it.
    for vcpus in 0..100_000 {
        fixture.machine.events().publish(Event::MachineStarted { vcpus });
    }
    fixture.machine.events().close();
    let (mut next, mut lost) = (2, 0);
    for record in events {
        if let Event::EventsLost { count, first } = record.event {
            assert_eq!(first, next);
            assert_eq!(record.seq, first + count - 1);
            next += count;
            lost += count;
        } else {
            assert_eq!(record.seq, next);
            next += 1;
        }
    }
    assert_eq!(next, 100_002, "every event was seen or counted");
    assert!(lost > 0);
}

#[test]
fn streams_without_follow_leave_the_connection_usable() {
    let fixture = Fixture::new();
    fixture.started(1);
    let text =
        fixture.raw(b"GET /v1/events HTTP/1.1\r\n\r\nGET /v1/machine HTTP/1.1\r\nConnection: close\r\n\r\n");
    let (events, machine) = text.split_once("\r\n0\r\n\r\n").expect("the stream ends");
    assert!(
        events.contains("Transfer-Encoding: chunked") && events.contains("\"machine_started\""),
        "{text}"
    );
    assert!(machine.starts_with("HTTP/1.1 200 OK"), "{text}");
    let text = fixture.raw(b"GET /v1/events HTTP/1.0\r\n\r\n");
    assert!(!text.contains("chunked"), "{text}");
    assert_eq!(text.lines().last().unwrap().chars().next(), Some('{'));
}

#[test]
fn clients_that_go_away_free_their_connection() {
    let fixture = Fixture::with(Limits { connections: 2, ..Limits::default() }, EventBus::new());
    let streams: Vec<Events> = (0..2).map(|_| fixture.client().events(0, true).unwrap()).collect();
    let error = refused(fixture.client().call("GET", "/v1/machine", None));
    assert_eq!(error.code, ErrorCode::TooManyConnections);
    assert_eq!(
        error.to_string(),
        "2 connections are open, and the server takes no more; close one, or try again later"
    );
    drop(streams);
    let start = Instant::now();
    while fixture.client().call("GET", "/v1/machine", None).is_err() {
        assert!(start.elapsed() < Duration::from_secs(10), "the connections are still taken");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn many_clients_at_once() {
    let fixture = Fixture::new();
    thread::scope(|scope| {
        for client in 0..8_u64 {
            let fixture = &fixture;
            scope.spawn(move || {
                for round in 0..20_u64 {
                    let offset = (client * 20 + round) * 8192;
                    let body = json!({"ranges": [{"offset": offset, "length": 1}]});
                    let answer = fixture.client().call("POST", "/v1/memory/p0/poison", Some(&body)).unwrap();
                    assert_eq!(answer.body["armed"][0]["length"], 4096);
                }
            });
        }
    });
    let list = fixture.client().call("GET", "/v1/memory/p0/poison", None).unwrap().body;
    assert_eq!(list["ranges"].as_array().unwrap().len(), 160);
    let events: Vec<_> = fixture.client().events(0, false).unwrap().map(Result::unwrap).collect();
    assert_eq!(events.iter().map(|record| record.seq).collect::<Vec<_>>(), (1..=160).collect::<Vec<_>>());
}

#[test]
fn operations_are_waited_for() {
    let fixture = Fixture::new();
    let client = fixture.client();
    let begun = client.call("DELETE", "/v1/devices/p0?mode=surprise", None).unwrap();
    assert_eq!((begun.status, &begun.body["state"]), (202, &json!("running")));
    let target = format!("/v1/operations/{}?wait=20s", begun.body["operation"]);
    assert_eq!(client.call("GET", &target, None).unwrap().body["state"], "done");
    let body = json!({"id": "p1", "size": "1G"});
    let begun = client.call("POST", "/v1/memory", Some(&body)).unwrap();
    let start = Instant::now();
    let target = format!("/v1/operations/{}?wait=100ms", begun.body["operation"]);
    assert_eq!(client.call("GET", &target, None).unwrap().body["state"], "running");
    assert!(start.elapsed() >= Duration::from_millis(100));
    assert_eq!(
        refused(client.call("GET", "/v1/operations/99?wait=1", None)).code,
        ErrorCode::NoSuchOperation
    );
}

#[test]
fn the_document_is_served() {
    let fixture = Fixture::new();
    let answer = fixture.client().call("GET", "/v1/openapi.json", None).unwrap();
    assert_eq!(answer.body, document());
}

#[test]
fn curl_is_asked_to_go_on_with_a_large_body() {
    let fixture = Fixture::new();
    let mut stream = fixture.connect();
    let body = r#"{"kind": "update"}"#;
    stream
        .write_all(
            format!(
                "POST /v1/memory/p0/notify HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
                body.len()
            )
            .as_bytes(),
        )
        .unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert_eq!(line, "HTTP/1.1 100 Continue\r\n");
    reader.read_line(&mut line).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    assert_eq!(read_reply(&mut reader).0, 200);
}

#[test]
fn stopping_ends_streams_and_removes_the_socket() {
    let mut fixture = Fixture::new();
    fixture.started(1);
    let idle = fixture.connect();
    let mut events = fixture.client().events(0, true).unwrap();
    assert_eq!(events.next().unwrap().unwrap().seq, 1);
    fixture.client().call("POST", "/v1/quit", None).unwrap();
    assert!(fixture.machine.has_quit());
    let start = Instant::now();
    fixture.machine.events().publish(Event::MachineStopped { cause: "quit".into() });
    drop(fixture.server.take());
    assert!(start.elapsed() < Duration::from_secs(2), "no connection had to be cut");
    assert_eq!(events.next().unwrap().unwrap().seq, 2);
    assert!(events.next().is_none());
    assert!(!fixture.path.exists());
    drop(idle);
    let error = fixture.client().call("GET", "/v1/machine", None).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("No machine answers on {0}: start one with --api-socket {0}", fixture.path.display())
    );
}
