use super::*;
use proptest::prelude::*;

fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..200)
}

fn window() -> impl Strategy<Value = WindowSize> {
    any::<(u16, u16)>().prop_map(|(rows, columns)| WindowSize { rows, columns })
}

fn stream() -> impl Strategy<Value = Stream> {
    prop_oneof![Just(Stream::Stdin), Just(Stream::Stdout), Just(Stream::Stderr)]
}

fn hello() -> impl Strategy<Value = Hello> {
    let role = prop_oneof![Just(Role::Host), Just(Role::Guest), Just(Role::NestedHost), Just(Role::Process)];
    let words = ".{0,30}";
    let notes = prop::collection::vec(words, 0..4);
    (Just(VERSION), any::<u64>(), role, any::<bool>(), words, words, notes).prop_map(
        |(version, nonce, role, kvm, release, kernel, notes)| Hello {
            version,
            nonce,
            role,
            kvm,
            release,
            kernel,
            notes,
        },
    )
}

fn message() -> impl Strategy<Value = Message> {
    let list = || prop::collection::vec(bytes(), 0..5);
    prop_oneof![
        hello().prop_map(Message::Hello),
        (list(), list(), bytes(), prop::option::of(window()))
            .prop_map(|(argv, env, cwd, terminal)| Message::Exec(Exec { argv, env, cwd, terminal })),
        bytes().prop_map(Message::Connect),
        (".{0,20}", bytes(), ".{0,20}").prop_map(|(tag, path, options)| Message::Mount(Share {
            tag,
            path,
            options
        })),
        bytes().prop_map(Message::Unmount),
        prop_oneof![Just(Power::Off), Just(Power::Reboot)].prop_map(Message::Power),
        any::<u32>().prop_map(Message::Opened),
        (any::<i32>(), ".{0,40}").prop_map(|(errno, text)| Message::Failed { errno, text }),
        (stream(), prop::collection::vec(any::<u8>(), 1..500)).prop_map(|(s, b)| Message::Data(s, b)),
        stream().prop_map(Message::Eof),
        (stream(), any::<u32>()).prop_map(|(s, n)| Message::Credit(s, n)),
        any::<i32>().prop_map(Message::Signal),
        window().prop_map(Message::Resize),
        Just(Message::Close),
        any::<i32>().prop_map(|code| Message::Exit(ExitStatus::Code(code))),
        any::<i32>().prop_map(|signal| Message::Exit(ExitStatus::Signal(signal))),
    ]
}

fn frame() -> impl Strategy<Value = Frame> {
    (any::<u32>(), message()).prop_map(|(channel, message)| Frame { channel, message })
}

fn session_hello(nonce: u64) -> Frame {
    let hello = Hello {
        version: VERSION,
        nonce,
        role: Role::Host,
        kvm: false,
        release: String::new(),
        kernel: String::new(),
        notes: vec![],
    };
    Frame { channel: SESSION, message: Message::Hello(hello) }
}

fn drain(decoder: &mut Decoder) -> Result<Vec<Frame>, ProtocolError> {
    let mut frames = Vec::new();
    while let Some(frame) = decoder.next()? {
        frames.push(frame);
    }
    Ok(frames)
}

proptest! {
    #[test]
    fn frames_come_back_in_whatever_pieces(
        frames in prop::collection::vec(frame(), 1..6),
        piece in 1usize..97,
    ) {
        let mut wire = Vec::new();
        for frame in &frames {
            frame.encode(&mut wire).unwrap();
        }
        let mut decoder = Decoder::new();
        let mut seen = Vec::new();
        for bytes in wire.chunks(piece) {
            decoder.push(bytes);
            seen.extend(drain(&mut decoder).unwrap());
        }
        prop_assert_eq!(seen, frames);
    }

    #[test]
    fn garbage_is_refused_or_awaited(garbage in prop::collection::vec(any::<u8>(), 0..2000)) {
        let mut decoder = Decoder::new();
        decoder.push(&garbage);
        let _ = drain(&mut decoder);
        decoder.resynchronize();
        let _ = drain(&mut decoder);
    }

    #[test]
    fn a_changed_frame_does_no_harm(frame in frame(), at in any::<prop::sample::Index>(), value: u8) {
        let mut wire = Vec::new();
        frame.encode(&mut wire).unwrap();
        let at = at.index(wire.len());
        wire[at] = value;
        let mut decoder = Decoder::new();
        decoder.push(&wire);
        let _ = drain(&mut decoder);
    }

    #[test]
    fn a_hello_is_found_behind_garbage(
        garbage in prop::collection::vec(any::<u8>(), 0..300),
        piece in 1usize..50,
        after in frame(),
    ) {
        let mut wire = garbage;
        let hello = session_hello(7);
        hello.encode(&mut wire).unwrap();
        after.encode(&mut wire).unwrap();
        let mut decoder = Decoder::new();
        decoder.resynchronize();
        let mut seen = Vec::new();
        for bytes in wire.chunks(piece) {
            decoder.push(bytes);
            seen.extend(drain(&mut decoder).unwrap());
        }
        prop_assert_eq!(seen, vec![hello, after]);
    }
}

#[test]
fn lengths_out_of_bounds_are_refused() {
    for length in [0u32, 4, MAX_FRAME as u32 - 3, u32::MAX] {
        let mut decoder = Decoder::new();
        decoder.push(&length.to_le_bytes());
        assert_eq!(decoder.next(), Err(ProtocolError::Length(length)));
    }
}

#[test]
fn unknown_kinds_and_leftovers_are_refused() {
    let mut decoder = Decoder::new();
    decoder.push(&[5, 0, 0, 0, 1, 0, 0, 0, 99]);
    assert_eq!(decoder.next(), Err(ProtocolError::Kind(99)));
    let mut decoder = Decoder::new();
    decoder.push(&[6, 0, 0, 0, 1, 0, 0, 0, CLOSE, 0]);
    assert_eq!(decoder.next(), Err(ProtocolError::Malformed(CLOSE)));
}

#[test]
fn a_message_beyond_a_frame_is_not_sent() {
    let exec = Exec { argv: vec![vec![b'x'; MAX_FRAME]], ..Exec::default() };
    let mut out = vec![1, 2, 3];
    let result = Frame { channel: 1, message: Message::Exec(exec) }.encode(&mut out);
    assert!(matches!(result, Err(ProtocolError::TooLarge(_))));
    assert_eq!(out, [1, 2, 3]);
}

#[test]
fn a_list_that_claims_more_than_the_frame_holds_is_refused() {
    let mut wire = vec![9, 0, 0, 0, 1, 0, 0, 0, EXEC];
    wire.extend_from_slice(&u32::MAX.to_le_bytes());
    let mut decoder = Decoder::new();
    decoder.push(&wire);
    assert_eq!(decoder.next(), Err(ProtocolError::Malformed(EXEC)));
}

#[test]
fn a_hello_of_another_version_says_so() {
    let mut wire = Vec::new();
    session_hello(9).encode(&mut wire).unwrap();
    let version = HEADER + MAGIC.len();
    wire[version..version + 4].copy_from_slice(&77u32.to_le_bytes());
    wire.truncate(version + 12);
    let length = wire.len() as u32 - 4;
    wire[..4].copy_from_slice(&length.to_le_bytes());
    let mut decoder = Decoder::new();
    decoder.push(&wire);
    let Some(Frame { message: Message::Hello(hello), .. }) = decoder.next().unwrap() else { panic!() };
    assert_eq!((hello.version, hello.nonce), (77, 9));
}
