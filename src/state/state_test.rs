use super::*;

use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const FORMAT: Format = Format { kind: "test", version: 1 };
/// Directory in which [`writes_for_ever`] writes, when it is told to.
const WRITER: &str = "ACONITE_TEST_STATE_WRITER";
const NAME: &str = "document.bin";

fn open(dir: &Path) -> State {
    State::open(dir, Locking::Here).unwrap()
}

#[test]
fn documents_outlive_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b");
    let state = open(&path);
    assert_eq!(state.read(NAME, FORMAT).unwrap(), None);
    state.write(NAME, FORMAT, b"one").unwrap();
    state.write(NAME, FORMAT, b"two").unwrap();
    state.write("erst-1.bin", FORMAT, b"").unwrap();
    drop(state);
    let state = open(&path);
    assert_eq!(state.read(NAME, FORMAT).unwrap().unwrap(), b"two");
    assert_eq!(state.names("erst-").unwrap(), ["erst-1.bin"]);
    assert_eq!(state.names("").unwrap(), [NAME, "erst-1.bin"]);
    state.remove(NAME).unwrap();
    state.remove(NAME).unwrap();
    assert_eq!(state.read(NAME, FORMAT).unwrap(), None);
}

#[test]
fn a_second_machine_is_told_who_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path());
    let error = State::open(dir.path(), Locking::Here).unwrap_err();
    let expected = format!(
        "State directory {} belongs to the machine of process {}: stop it, or choose another directory",
        dir.path().canonicalize().unwrap().display(),
        std::process::id()
    );
    assert_eq!(error.to_string(), expected);
    State::open(dir.path(), Locking::Elsewhere).unwrap();
    drop(first);
    open(dir.path());
}

#[test]
fn a_damaged_document_is_named_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).write(NAME, FORMAT, b"precious").unwrap();
    let path = dir.path().join(NAME);
    let whole = fs::read(&path).unwrap();
    let newer = Format { version: 2, ..FORMAT };
    for (bytes, format) in
        [(&whole[..whole.len() - 1], FORMAT), (b"mine".as_slice(), FORMAT), (&whole, newer)]
    {
        fs::write(&path, bytes).unwrap();
        let state = open(dir.path());
        for result in [state.read(NAME, format).map(|_| ()), state.write(NAME, format, b"new")] {
            let error = result.unwrap_err();
            assert!(matches!(error, StateError::Damaged { .. }), "{error}");
            assert!(error.to_string().contains(NAME), "{error}");
        }
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
}

#[test]
fn names_cannot_leave_the_directory() {
    let dir = tempfile::tempdir().unwrap();
    let state = open(dir.path());
    for name in ["", "lock", "../a.b", "a/b.c", ".a.new", "A.b", "a.", ".b", "a.b.c", "a b.c"] {
        assert!(matches!(state.write(name, FORMAT, b""), Err(StateError::Name { .. })), "{name}");
        assert!(matches!(state.read(name, FORMAT), Err(StateError::Name { .. })), "{name}");
        assert!(matches!(state.remove(name), Err(StateError::Name { .. })), "{name}");
    }
}

#[test]
fn a_directory_that_cannot_be_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(matches!(State::open(&file, Locking::Here), Err(StateError::Directory { .. })));
    assert!(matches!(State::open(&file.join("sub"), Locking::Here), Err(StateError::Directory { .. })));
}

/// Not a test by itself: what [`a_killed_writer_leaves_old_or_new`] starts and kills.
#[test]
fn writes_for_ever() {
    let Some(dir) = std::env::var_os(WRITER) else { return };
    let state = open(Path::new(&dir));
    let first = state.read(NAME, FORMAT).unwrap().map_or(0, |content| number(&content));
    for number in first + 1.. {
        state.write(NAME, FORMAT, &content(number)).unwrap();
    }
}

/// Content of several pages that all say the same number.
fn content(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(4096 + (number % 7) as usize * 1000)
}

fn number(bytes: &[u8]) -> u64 {
    let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert_eq!(bytes, content(number), "a torn document");
    number
}

#[test]
fn a_killed_writer_leaves_old_or_new() {
    let dir = tempfile::tempdir().unwrap();
    let mut last = 0;
    for round in 0..20u64 {
        let mut writer = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "state::tests::writes_for_ever"])
            .env(WRITER, dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Not before it has begun, and then at a moment that has nothing to do with its own.
        let path = dir.path().join(NAME);
        let deadline = Instant::now() + Duration::from_secs(60);
        let before = fs::metadata(&path).and_then(|m| m.modified()).ok();
        while fs::metadata(&path).and_then(|m| m.modified()).ok() == before {
            assert!(Instant::now() < deadline, "the writer does not write");
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_micros(round * 733 % 5000));
        writer.kill().unwrap();
        writer.wait().unwrap();
        let state = open(dir.path());
        let now = number(&state.read(NAME, FORMAT).unwrap().unwrap());
        assert!(now > last, "round {round}: {now} after {last}");
        last = now;
        assert_eq!(state.names("").unwrap(), [NAME]);
        assert!(fs::read_dir(dir.path()).unwrap().count() <= 2, "a temporary file stays");
    }
}
