//! The client against the real agent, which runs as an ordinary process here.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use aconite_agent::protocol::{ExitStatus, MAX_CHANNELS, WindowSize};

use super::*;
use crate::guest::AGENT;

const PATIENCE: Duration = Duration::from_secs(30);

/// An agent that ends with the test.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start() -> (UnixStream, Agent) {
    let (here, there) = UnixStream::pair().unwrap();
    let mut command = Command::new(env!("ACONITE_AGENT"));
    command.args(["--fd", "0"]).stdin(Stdio::from(OwnedFd::from(there)));
    (here, Agent(command.spawn().unwrap()))
}

fn connect() -> (Client, Agent) {
    let (stream, agent) = start();
    (Client::connect(stream, PATIENCE).unwrap(), agent)
}

fn command(words: &[&str]) -> Exec {
    Exec { argv: words.iter().map(|word| word.as_bytes().to_vec()).collect(), ..Exec::default() }
}

fn shell(script: &str) -> Exec {
    command(&["sh", "-c", script])
}

#[test]
fn the_agent_is_a_static_program() {
    assert!(AGENT.starts_with(b"\x7fELF"));
    assert!(AGENT.len() < 2 << 20, "the agent has grown to {} bytes", AGENT.len());
    let headers = AGENT;
    assert!(!headers.windows(15).any(|window| window == b"/lib64/ld-linux"));
}

#[test]
fn the_agent_says_who_it_is() {
    let (client, _agent) = connect();
    let hello = client.hello();
    assert_eq!((hello.version, hello.role, hello.kvm), (VERSION, Role::Process, false));
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(hello.release, release.trim_end());
}

#[test]
fn a_command_runs_with_its_streams_and_status() {
    let (client, _agent) = connect();
    let mut exec = shell("echo \"$WORD $PWD\"; echo bad >&2; cat; exit 7");
    exec.env = vec![b"WORD=good".to_vec()];
    exec.cwd = b"/usr".to_vec();
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let input = Box::new(&b"from here\n"[..]);
    let status = client.exec(exec).unwrap().bridge(Some(input), &mut stdout, &mut stderr).unwrap();
    assert_eq!(status, ExitStatus::Code(7));
    assert_eq!(stdout, b"good /usr\nfrom here\n");
    assert_eq!(stderr, b"bad\n");
}

#[test]
fn what_cannot_be_started_is_told_apart() {
    let (client, _agent) = connect();
    let missing = client.exec(command(&["no-such-program"])).unwrap_err();
    assert_eq!(missing.shell_code(), Some(127), "{missing}");
    assert!(missing.to_string().contains("no-such-program"), "{missing}");
    let not_executable = client.exec(command(&["/etc/passwd"])).unwrap_err();
    assert_eq!(not_executable.shell_code(), Some(126), "{not_executable}");
    let no_directory = client.exec(Exec { cwd: b"/no/where".to_vec(), ..command(&["true"]) }).unwrap_err();
    assert!(no_directory.to_string().contains("/no/where"), "{no_directory}");
    assert!(client.exec(Exec::default()).is_err());
    let too_long = "x".repeat(100_000);
    assert!(matches!(client.exec(command(&["echo", &too_long])), Err(ClientError::Request(_))));
    assert!(matches!(client.power(Power::Off), Ok(())));
    assert!(matches!(client.unmount(b"/nowhere"), Err(ClientError::Failed { errno: libc::EPERM, .. })));
    assert!(client.exec(command(&["true"])).unwrap().wait().unwrap().success());
}

#[test]
fn signals_reach_the_group() {
    let (client, _agent) = connect();
    let process = client.exec(shell("sleep 100 | sleep 100")).unwrap();
    process.control().signal(libc::SIGTERM).unwrap();
    assert_eq!(process.wait().unwrap(), ExitStatus::Signal(libc::SIGTERM));

    let mut process =
        client.exec(shell("trap 'exit 3' USR1; echo ready; while :; do sleep 0.01; done")).unwrap();
    let mut stdout = process.take_stdout().unwrap();
    stdout.read_exact(&mut [0; 6]).unwrap();
    process.control().signal(libc::SIGUSR1).unwrap();
    assert_eq!(process.wait().unwrap(), ExitStatus::Code(3));
}

#[test]
fn a_terminal_has_a_size_and_an_interrupt_key() {
    let (client, _agent) = connect();
    let mut exec = shell("tty; stty size; read line; echo got $line; stty size; exec cat");
    exec.terminal = Some(WindowSize { rows: 30, columns: 90 });
    let mut process = client.exec(exec).unwrap();
    let (mut stdin, mut stdout) = (process.take_stdin().unwrap(), process.take_stdout().unwrap());
    let mut seen = String::new();
    let mut until = |text: &str| {
        let mut buffer = [0; 100];
        while !seen.contains(text) {
            let count = stdout.read(&mut buffer).unwrap();
            assert!(count > 0, "{seen:?} ends without {text:?}");
            seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    };
    until("/dev/pts/");
    until("30 90\r\n");
    process.control().resize(WindowSize { rows: 40, columns: 100 }).unwrap();
    stdin.write_all(b"hello\n").unwrap();
    until("got hello\r\n");
    until("40 100\r\n");
    stdin.write_all(b"\x03").unwrap();
    assert_eq!(process.wait().unwrap(), ExitStatus::Signal(libc::SIGINT));
}

#[test]
fn the_end_of_input_reaches_a_terminal() {
    let (client, _agent) = connect();
    let exec = Exec { terminal: Some(WindowSize { rows: 24, columns: 80 }), ..command(&["cat"]) };
    let output = client.exec(exec).unwrap().output().unwrap();
    assert_eq!(output.status, ExitStatus::Code(0));
}

#[test]
fn ten_megabytes_come_through_a_slow_reader() {
    let (client, _agent) = connect();
    let mut process = client.exec(shell("head -c 10000000 /dev/zero; echo done >&2")).unwrap();
    let mut stdout = process.take_stdout().unwrap();
    // A reader that does not read must not hold anybody else up.
    assert_eq!(client.exec(shell("echo a")).unwrap().output().unwrap().stdout, b"a\n");
    let mut total = 0;
    let mut buffer = vec![0; 100_000];
    loop {
        match stdout.read(&mut buffer).unwrap() {
            0 => break,
            count => total += count,
        }
    }
    assert_eq!(total, 10_000_000);
    let mut text = String::new();
    process.take_stderr().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "done\n");
    assert_eq!(process.wait().unwrap(), ExitStatus::Code(0));
}

#[test]
fn ten_megabytes_go_there_and_back() {
    let (client, _agent) = connect();
    let sent: Vec<u8> = (0..10_000_000u32).map(|n| (n * 7 / 3) as u8).collect();
    let mut received = Vec::new();
    let input = Box::new(io::Cursor::new(sent.clone()));
    let status =
        client.exec(command(&["cat"])).unwrap().bridge(Some(input), &mut received, io::sink()).unwrap();
    assert!(status.success());
    assert!(sent == received, "{} bytes of {} came back", received.len(), sent.len());
}

#[test]
fn input_that_nobody_reads_holds_nobody_up() {
    let (client, _agent) = connect();
    let endless = Box::new(io::repeat(b'y'));
    let status =
        client.exec(shell("exec <&-; sleep 0.2")).unwrap().bridge(Some(endless), io::sink(), io::sink());
    assert!(status.unwrap().success());
    let mut process = client.exec(shell("yes")).unwrap();
    drop(process.take_stdout());
    thread::sleep(Duration::from_millis(100));
    assert_eq!(process.wait_timeout(Duration::from_millis(1)).unwrap(), None);
    drop(process);
    assert!(client.exec(command(&["true"])).unwrap().wait().unwrap().success());
}

#[test]
fn a_local_output_that_breaks_ends_the_command() {
    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (client, _agent) = connect();
    let status = client.exec(command(&["yes"])).unwrap().bridge(None, Broken, io::sink()).unwrap();
    assert_eq!(status, ExitStatus::Signal(libc::SIGPIPE));
}

#[test]
fn a_hundred_commands_run_at_once() {
    let (client, _agent) = connect();
    let processes: Vec<_> = (0..100)
        .map(|number| {
            (number, client.exec(shell(&format!("read go; echo {number}; exit {number}"))).unwrap())
        })
        .collect();
    let workers: Vec<_> = processes
        .into_iter()
        .map(|(number, process)| {
            thread::spawn(move || {
                let mut output = Vec::new();
                let input = Box::new(&b"go\n"[..]);
                let status = process.bridge(Some(input), &mut output, io::sink()).unwrap();
                assert_eq!(status, ExitStatus::Code(number));
                assert_eq!(output, format!("{number}\n").into_bytes());
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
}

#[test]
fn there_is_a_limit_to_channels() {
    let (client, _agent) = connect();
    let open: Vec<_> = (0..MAX_CHANNELS).map(|_| client.exec(command(&["cat"])).unwrap()).collect();
    let error = client.exec(command(&["true"])).unwrap_err();
    assert!(error.to_string().contains("512"), "{error}");
    drop(open);
    let start = Instant::now();
    while client.exec(command(&["true"])).is_err() {
        assert!(start.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_background_process_does_not_hold_up_the_end() {
    let (client, _agent) = connect();
    let start = Instant::now();
    let output = client.exec(shell("echo first; sleep 60 & exit 0")).unwrap().output().unwrap();
    assert_eq!((output.status, &output.stdout[..]), (ExitStatus::Code(0), &b"first\n"[..]));
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_dropped_command_is_killed() {
    let (client, _agent) = connect();
    let process = client.exec(command(&["sleep", "1000"])).unwrap();
    let path = format!("/proc/{}", process.pid());
    assert!(std::fs::exists(&path).unwrap());
    drop(process);
    let start = Instant::now();
    while std::fs::exists(&path).unwrap() {
        assert!(start.elapsed() < PATIENCE, "{path} is still there");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_socket_is_reached_in_both_directions() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        stream.write_all(text.to_uppercase().as_bytes()).unwrap();
    });
    let (client, _agent) = connect();
    let connection = client.connect_socket(path.as_os_str().as_encoded_bytes()).unwrap();
    let (mut local, remote) = UnixStream::pair().unwrap();
    let bridge = thread::spawn(move || connection.bridge(remote));
    local.write_all(b"hello").unwrap();
    local.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    local.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "HELLO");
    bridge.join().unwrap().unwrap();
    server.join().unwrap();
    let error = client.connect_socket(b"/no/such/socket").unwrap_err();
    assert!(matches!(error, ClientError::Failed { errno: libc::ENOENT, .. }), "{error}");
}

#[test]
fn the_end_of_the_machine_ends_everything() {
    let (client, agent) = connect();
    let process = client.exec(command(&["sleep", "1000"])).unwrap();
    drop(agent);
    assert!(matches!(process.wait(), Err(ClientError::Lost(_))));
    assert!(matches!(client.exec(command(&["true"])), Err(ClientError::Lost(_))));
    assert!(client.lost().is_some());
}

#[test]
fn nobody_there_is_an_error_in_time() {
    let (stream, _other) = UnixStream::pair().unwrap();
    let error = Client::connect(stream, Duration::from_millis(50)).unwrap_err();
    assert!(matches!(error, ClientError::Silent(_)));
    let (stream, other) = UnixStream::pair().unwrap();
    drop(other);
    assert!(matches!(Client::connect(stream, PATIENCE), Err(ClientError::Lost(_))));
}

#[test]
fn an_agent_survives_garbage_and_meets_the_next_client() {
    let (mut stream, _agent) = start();
    let mut garbage = vec![0u8; 100_000];
    let mut number = 12345u32;
    for byte in &mut garbage {
        number = number.wrapping_mul(1664525).wrapping_add(1013904223);
        *byte = (number >> 24) as u8;
    }
    stream.write_all(&garbage).unwrap();
    let client = Client::connect(stream.try_clone().unwrap(), PATIENCE).unwrap();
    let process = client.exec(command(&["sleep", "1000"])).unwrap();
    assert!(client.exec(command(&["true"])).unwrap().wait().unwrap().success());
    // Garbage in the middle of a session ends it, and what it has started.
    stream.write_all(&garbage).unwrap();
    assert!(matches!(process.wait(), Err(ClientError::Lost(_))));
}

#[test]
fn a_client_survives_garbage() {
    let (here, mut there) = UnixStream::pair().unwrap();
    let connecting = thread::spawn(move || Client::connect(here, PATIENCE));
    let mut wire = vec![0xff; 1000];
    let mut decoder = Decoder::new();
    let mut hello = loop {
        let mut buffer = [0; 1000];
        let count = there.read(&mut buffer).unwrap();
        decoder.push(&buffer[..count]);
        if let Some(Frame { message: Message::Hello(hello), .. }) = decoder.next().unwrap() {
            break hello;
        }
    };
    hello.role = Role::Guest;
    Frame { channel: SESSION, message: Message::Hello(hello) }.encode(&mut wire).unwrap();
    there.write_all(&wire).unwrap();
    let client = connecting.join().unwrap().unwrap();
    there.write_all(&[0xff; 1000]).unwrap();
    let error = client.exec(command(&["true"])).map(|_| ()).unwrap_err();
    assert!(matches!(error, ClientError::Lost(_)), "{error}");
}
