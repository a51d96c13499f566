//! Tests of the request parser.

use proptest::prelude::*;

use super::*;

fn head(text: &str) -> Result<Option<Head>, Error> {
    parse_head(text.as_bytes(), &Limits::default())
}

fn code(text: &str) -> ErrorCode {
    match head(text) {
        Ok(_) => panic!("{text:?} was accepted"),
        Err(error) => error.code,
    }
}

#[test]
fn heads() {
    let head =
        |text: &str| parse_head(text.as_bytes(), &Limits::default()).unwrap().expect("the head is complete");
    let found =
        head("POST /v1/memory/p0?a=b#c HTTP/1.1\r\nContent-LENGTH: 5\r\nExpect: 100-continue\r\n\r\n12345");
    assert_eq!(found.content_length, 5);
    assert!(found.expects_continue);
    assert_eq!((found.request.path.as_str(), found.request.query.as_str()), ("/v1/memory/p0", "a=b"));
    assert!(found.request.keep_alive);
    assert!(!head("GET / HTTP/1.1\r\nConnection: x, Close\r\n\r\n").request.keep_alive);
    assert!(!head("GET / HTTP/1.0\r\n\r\n").request.keep_alive);
    assert!(head("GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").request.keep_alive);
}

#[test]
fn heads_that_are_refused() {
    assert!(head("GET / HTTP/1.1\r\nA: b\r\n").unwrap().is_none());
    assert_eq!(code("\0\0\0\0"), ErrorCode::BadHttp);
    assert_eq!(code("GET / HTTP/2.0\r\n\r\n"), ErrorCode::BadHttp);
    assert_eq!(code("GET v1 HTTP/1.1\r\n\r\n"), ErrorCode::BadHttp);
    assert_eq!(code("GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"), ErrorCode::BadHttp);
    assert_eq!(code("GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"), ErrorCode::BadHttp);
    assert_eq!(code("GET / HTTP/1.1\r\nExpect: tea\r\n\r\n"), ErrorCode::BadHttp);
    assert_eq!(code("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), ErrorCode::LengthRequired);
    assert_eq!(code("POST / HTTP/1.1\r\nContent-Length: 1073741824\r\n\r\n"), ErrorCode::BodyTooLarge);
    assert_eq!(
        code("POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999999\r\n\r\n"),
        ErrorCode::BodyTooLarge
    );
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(65));
    assert_eq!(code(&many), ErrorCode::HeadTooLarge);
    let long = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "b".repeat(17 << 10));
    assert_eq!(code(&long), ErrorCode::HeadTooLarge);
}

#[test]
fn percent() {
    assert_eq!(percent_decode("0x200040+64").unwrap(), "0x200040+64");
    assert_eq!(percent_decode("a%2Fb%2b").unwrap(), "a/b+");
    for text in ["%", "%4", "%zz", "%ff"] {
        assert!(percent_decode(text).is_err(), "{text}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse_head(&bytes, &Limits::default());
    }

    #[test]
    fn what_is_encoded_is_decoded(text in "\\PC{0,40}") {
        prop_assert_eq!(percent_decode(&percent_encode(&text)).unwrap(), text);
    }

    #[test]
    fn no_text_makes_decoding_panic(text in "[%0-9a-fé]{0,20}") {
        let _ = percent_decode(&text);
    }
}
