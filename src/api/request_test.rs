//! Tests of the way from a request to what it means.

use proptest::prelude::*;

use super::*;
use crate::command::{
    Command, Consume, EveryStride, FullLineStore, MceClass, MceReach, MceRequest, NotifyKind, PoisonAlign,
    PoisonPattern, PoisonPlace, PolicyChange, PowerCut, ProcessMemory, RandomLines, RemoveMode,
};
use crate::config::{Channel, Disk, Pmem};
use crate::units::Address;

fn action(method: &str, target: &str, body: &str) -> Action {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    resolve(method, path, query, body.as_bytes()).unwrap_or_else(|refusal| panic!("{}", refusal.error)).1
}

fn refused(method: &str, target: &str, body: &str) -> (ErrorCode, String) {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let error = resolve(method, path, query, body.as_bytes()).unwrap_err().error;
    (error.code, error.to_string())
}

#[test]
fn every_route_leads_to_its_command() {
    let device = || "p0".to_owned();
    let cases = [
        ("GET", "/v1/machine", "", Command::MachineInfo),
        ("GET", "/v1/memory", "", Command::ListMemory),
        ("GET", "/v1/memory/p0", "", Command::ShowMemory { device: device() }),
        (
            "GET",
            "/v1/memory/%700/poison",
            "",
            Command::PoisonList { device: device(), from: 0, limit: 10_000 },
        ),
        (
            "GET",
            "/v1/memory/p0/poison?from=0x1000&limit=5",
            "",
            Command::PoisonList { device: device(), from: 4096, limit: 5 },
        ),
        (
            "POST",
            "/v1/memory/p0/poison",
            r#"{"ranges": [{"offset": "0x200040", "length": 64}, {"offset": 4096, "length": 1}]}"#,
            Command::PoisonAdd {
                device: device(),
                what: PoisonPattern::Ranges(vec![ByteRange::new(0x200040, 64), ByteRange::new(4096, 1)]),
            },
        ),
        (
            "POST",
            "/v1/memory/p0/poison",
            r#"{"random": {"count": 5, "within": {"offset": 0, "length": 4096}, "align": "sector"}}"#,
            Command::PoisonAdd {
                device: device(),
                what: PoisonPattern::Random(RandomLines {
                    count: 5,
                    seed: 0,
                    within: Some(ByteRange::new(0, 4096)),
                    align: PoisonAlign::Sector,
                }),
            },
        ),
        (
            "POST",
            "/v1/memory/p0/poison",
            r#"{"every": {"stride": 4096}}"#,
            Command::PoisonAdd {
                device: device(),
                what: PoisonPattern::Every(EveryStride { stride: 4096, length: 64, within: None }),
            },
        ),
        (
            "POST",
            "/v1/poison",
            r#"{"process": {"pid": 7, "address": "0x7f00"}}"#,
            Command::PoisonPlace {
                place: PoisonPlace::Process(ProcessMemory { pid: 7, address: 0x7f00.into(), length: 1 }),
            },
        ),
        (
            "GET",
            "/v1/memory/p0/poison/policy",
            "",
            Command::PoisonPolicy { device: device(), change: PolicyChange::default() },
        ),
        (
            "PATCH",
            "/v1/memory/p0/poison/policy",
            r#"{"consume": "log", "full_line_store": "clear"}"#,
            Command::PoisonPolicy {
                device: device(),
                change: PolicyChange {
                    consume: Some(Consume::Log),
                    full_line_store: Some(FullLineStore::Clear),
                    ..PolicyChange::default()
                },
            },
        ),
        ("DELETE", "/v1/memory/p0/poison", "", Command::PoisonClear { device: device(), ranges: None }),
        (
            "DELETE",
            "/v1/memory/p0/poison?range=0x1000+64&range=0%2b1",
            "",
            Command::PoisonClear {
                device: device(),
                ranges: Some(vec![ByteRange::new(4096, 64), ByteRange::new(0, 1)]),
            },
        ),
        (
            "POST",
            "/v1/memory/p0/notify",
            r#"{"kind": "uncorrectable"}"#,
            Command::Notify { device: device(), kind: NotifyKind::Uncorrectable },
        ),
        (
            "DELETE",
            "/v1/devices/p0?mode=surprise",
            "",
            Command::Remove { device: device(), mode: RemoveMode::Surprise, via: None, timeout: None },
        ),
        (
            "POST",
            "/v1/disks",
            r#"{"id": "d1", "size": "1G", "at": "d0"}"#,
            Command::InsertDisk { disk: Box::new(Disk::parse("disk", "id=d1,size=1G,at=d0").unwrap()) },
        ),
        (
            "DELETE",
            "/v1/devices/p0?mode=eject&via=container&timeout=5s",
            "",
            Command::Remove {
                device: device(),
                mode: RemoveMode::Eject,
                via: Some(Channel::Container),
                timeout: Some("5s".parse().unwrap()),
            },
        ),
        (
            "POST",
            "/v1/vcpus/3/mce",
            r#"{"class": "srar-fetch", "address": "0x1040", "overflow": true, "reach": "local"}"#,
            Command::RaiseMce {
                vcpu: 3,
                request: MceRequest {
                    class: Some(MceClass::SrarFetch),
                    address: Some(Address(0x1040)),
                    overflow: true,
                    reach: Some(MceReach::Local),
                    ..MceRequest::default()
                },
            },
        ),
        ("GET", "/v1/operations/7", "", Command::ShowOperation { operation: 7 }),
        ("POST", "/v1/pause", "", Command::Pause),
        ("POST", "/v1/resume", "", Command::Resume),
        (
            "POST",
            "/v1/power/cut",
            r#"{"seed": 7}"#,
            Command::PowerCut(PowerCut { seed: Some(7), again: false }),
        ),
        ("POST", "/v1/quit", "", Command::Quit),
        (
            "POST",
            "/v1/memory",
            r#"{"id": "p1", "size": "1G", "at": "p0"}"#,
            Command::Insert { pmem: Box::new(Pmem::parse("pmem", "id=p1,size=1G,at=p0").unwrap()) },
        ),
    ];
    for (method, target, body, command) in cases {
        assert_eq!(action(method, target, body), Action::Execute(command), "{method} {target}");
    }
    assert_eq!(
        action("GET", "/v1/operations/7?wait=10s", ""),
        Action::Wait { operation: 7, patience: "10s".parse().unwrap() }
    );
    assert_eq!(action("GET", "/v1/events?since=5&follow=1", ""), Action::Stream { since: 5, follow: true });
    assert_eq!(action("GET", "/v1/openapi.json", ""), Action::Document);
}

#[test]
fn every_mistake_has_its_code_and_words() {
    let cases = [
        (
            "GET",
            "/v2/machine",
            "",
            ErrorCode::NoSuchRoute,
            "There is nothing under \"/v2/machine\"; see /v1/openapi.json for what can be asked",
        ),
        (
            "GET",
            "/v1/memory/",
            "",
            ErrorCode::NoSuchRoute,
            "There is nothing under \"/v1/memory/\"; see /v1/openapi.json for what can be asked",
        ),
        (
            "PUT",
            "/v1/memory/p0/stale",
            "",
            ErrorCode::MethodNotAllowed,
            "/v1/memory/p0/stale cannot be asked with PUT; use GET, PATCH",
        ),
        (
            "DELETE",
            "/v1/devices/p0",
            "",
            ErrorCode::BadParameter,
            "Parameter mode is missing; give mode=surprise or eject",
        ),
        (
            "DELETE",
            "/v1/devices/p0?mode=gently",
            "",
            ErrorCode::BadParameter,
            "Parameter mode: \"gently\" is not known; give surprise or eject",
        ),
        (
            "DELETE",
            "/v1/devices/p0?mod=surprise",
            "",
            ErrorCode::BadParameter,
            "There is no parameter \"mod\" of DELETE /v1/devices/{id}; did you mean \"mode\"? Known: mode, via, timeout",
        ),
        (
            "DELETE",
            "/v1/devices/p0?mode=eject&mode=eject",
            "",
            ErrorCode::BadParameter,
            "Parameter mode is given twice; give it once",
        ),
        (
            "GET",
            "/v1/machine?x=1",
            "",
            ErrorCode::BadParameter,
            "There is no parameter \"x\" of GET /v1/machine; leave it out: there are no parameters here",
        ),
        (
            "GET",
            "/v1/machine",
            "{}",
            ErrorCode::BadParameter,
            "GET /v1/machine takes no body; send it without one",
        ),
        (
            "DELETE",
            "/v1/memory/p0/poison?range=x",
            "",
            ErrorCode::BadParameter,
            "Parameter range: \"x\" is not a number; write it in decimal or as 0x and hexadecimal digits, such as 0x200040",
        ),
        (
            "GET",
            "/v1/operations/x",
            "",
            ErrorCode::NoSuchOperation,
            "There is no operation \"x\"; give the number that the request was answered with",
        ),
        (
            "GET",
            "/v1/operations/1?wait=long",
            "",
            ErrorCode::BadParameter,
            "Parameter wait: \"long\" is not a time; write seconds or a number with ms, s, m or h, such as 90s or 5m",
        ),
        (
            "GET",
            "/v1/events?since=-1",
            "",
            ErrorCode::BadParameter,
            "Parameter since: \"-1\" is no number; give that of an event, or 0",
        ),
        (
            "GET",
            "/v1/events?follow=maybe",
            "",
            ErrorCode::BadParameter,
            "Parameter follow: \"maybe\" is no switch; give 1 or 0",
        ),
        (
            "POST",
            "/v1/memory/p0/poison",
            "",
            ErrorCode::BadJson,
            "The request has no body; send a JSON object; see /v1/openapi.json",
        ),
        (
            "POST",
            "/v1/memory/p0/poison",
            "{",
            ErrorCode::BadJson,
            "The body is no JSON: EOF while parsing an object at line 1 column 1; send one JSON object",
        ),
        (
            "POST",
            "/v1/memory/p0/poison",
            "{\"ranges\": [{\"offset\": -1, \"length\": 1}]}",
            ErrorCode::BadJson,
            "The body does not fit this route: invalid value: integer `-1`, expected an address such as \"0x200040\" or a number of at least 0 at line 1 column 25; see /v1/openapi.json for its shape",
        ),
        (
            "POST",
            "/v1/memory",
            "{\"size\": \"1G\", \"via\": \"e820\"}",
            ErrorCode::InvalidConfig,
            "Wrong pmem: via e820: the E820 map is read once, when the guest starts; give via=nfit or via=virtio, or declare the device when the machine starts",
        ),
        (
            "POST",
            "/v1/memory",
            "{\"size\": \"1000\"}",
            ErrorCode::InvalidConfig,
            "Wrong pmem: size 1000: Linux maps persistent memory only in multiples of 2M; give 2M",
        ),
    ];
    for (method, target, body, code, words) in cases {
        assert_eq!(refused(method, target, body), (code, words.to_owned()), "{method} {target} {body}");
    }
    let deep = "[".repeat(100_000);
    assert_eq!(refused("POST", "/v1/memory/p0/poison", &deep).0, ErrorCode::BadJson);
}

proptest! {
    #[test]
    fn no_request_makes_it_panic(
        method in "GET|POST|DELETE",
        path in "(/v1/(memory|operations|events)(/[%a-z0-9]{0,4}(/poison|/notify)?)?)|\\PC{0,20}",
        query in "((mode|range|since|follow|wait)=[%+a-z0-9]{0,6}&?){0,3}",
        body in "\\PC{0,40}",
    ) {
        let _ = resolve(&method, &path, &query, body.as_bytes());
    }
}
