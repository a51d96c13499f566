//! Requests that are wrong are refused with a stable code, and change nothing.

use aconite_tests::machine::PMEM;
use aconite_tests::{Run, http};
use serde_json::Value;
use std::time::Duration;

#[test]
fn refusals() {
    let mut guest = Run::new().pmem("size=256M,id=p0").shell();
    guest.until_ok("test -b /dev/pmem0", PMEM);
    let info = guest.ctl(&["info"]);
    assert_eq!((&info["state"], &info["vcpus"]), (&"running".into(), &1.into()), "{info}");
    let device = guest.device("p0");
    let before = guest.last_event();

    for (arguments, code) in [
        (vec!["memory", "p7"], "no_such_device"),
        (vec!["poison", "add", "p7", "0"], "no_such_device"),
        (vec!["poison", "add", "p0", "0x10000000"], "outside_device"),
        (vec!["poison", "add", "p0", "0xfffffff+2"], "outside_device"),
        (vec!["poison", "add", "p0", "0", "0x10000000"], "outside_device"),
        (vec!["poison", "list", "p7"], "no_such_device"),
        (vec!["notify", "p7", "uncorrectable"], "no_such_device"),
        (vec!["remove", "p7", "--surprise"], "no_such_device"),
        (vec!["insert", "pmem", "size=256M,id=p1"], "no_free_slot"),
        (vec!["insert", "pmem", "size=256M,id=p0"], "id_in_use"),
        (vec!["operation", "99"], "no_such_operation"),
        (vec!["resume"], "wrong_state"),
    ] {
        let error = guest.ctl_refused(&arguments);
        assert_eq!(error["code"], code, "{arguments:?}: {error}");
        for part in ["message", "remedy"] {
            assert!(error[part].as_str().is_some_and(|text| !text.is_empty()), "{arguments:?}: {error}");
        }
    }

    let socket = guest.socket();
    for (method, target, body, status, code) in [
        ("GET", "/v1/nothing", "", 404, "no_such_route"),
        ("DELETE", "/v1/machine", "", 405, "method_not_allowed"),
        ("POST", "/v1/memory/p0/poison", "{\"ranges\": [", 400, "bad_json"),
        ("POST", "/v1/memory/p0/poison", "{\"rangez\": []}", 400, "bad_json"),
        ("POST", "/v1/memory/p0/poison", "\u{0}\u{1}", 400, "bad_json"),
    ] {
        let reply = http::request(&socket, method, target, body);
        assert_eq!(
            (reply.status, reply.code().as_str()),
            (status, code),
            "{method} {target}: {}",
            reply.text
        );
    }
    // Nothing of a body that is too long is kept, and the server says so before it has come.
    let head = format!(
        "POST /v1/memory/p0/poison HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        1 << 30
    );
    let reply = http::raw(&socket, head.as_bytes(), 1 << 30);
    assert_eq!((reply.status, reply.code().as_str()), (413, "body_too_large"), "{}", reply.text);
    let reply = http::raw(&socket, b"no http at all\r\n\r\n", 0);
    assert_eq!((reply.status, reply.code().as_str()), (400, "bad_http"), "{}", reply.text);

    assert_eq!(guest.device("p0"), device, "nothing has changed");
    assert_eq!(guest.events(before), Vec::<Value>::new(), "nothing has happened");

    // Pause and quit, which end a machine's life in order.
    guest.ctl(&["pause"]);
    assert_eq!(guest.ctl(&["info"])["state"], "paused");
    assert_eq!(guest.ctl_refused(&["pause"])["code"], "wrong_state");
    guest.ctl(&["resume"]);
    assert_eq!(guest.ok("echo still here"), "still here");
    guest.ctl(&["quit"]);
    let ended = guest.wait(Duration::from_secs(60));
    assert_eq!(ended.result()["cause"], "quit");
}
