//! Carries out a plan in a level 1 of its own: time-outs, and one more try for what did not end.

use crate::plan::{Line, Measured, Plan, Step};
use crate::stage::Stage;
use aconite::guest::client::Client;
use aconite::guest::process::Process;
use aconite::host::nested::machine::Clock;
use aconite::host::nested::private::Private;
use aconite_agent::protocol::Exec;
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// Where the files are in level 1: in memory, and not where guests mount something over what is packed for them.
const DIR: &str = "/aconite-bench";
/// How long a device may take in the host's time; it takes half a minute.
const LONG_STEP: Duration = Duration::from_secs(200);
/// How long any other step may take. It takes ten seconds, but under the instruction clock guests, mostly QEMU's,
/// sometimes hang together with their level 1.
const STEP: Duration = Duration::from_secs(75);
/// How long level 1 may say nothing between steps.
const PAUSE: Duration = Duration::from_secs(200);
/// How often a step is tried.
const TRIES: usize = 2;

/// What came of the steps.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Steps and what they yielded.
    pub measured: Vec<(Step, Measured)>,
    /// Steps that failed, in words.
    pub failed: Vec<String>,
}

/// Measures `steps`.
pub fn measure(stage: &Stage, clock: Clock, steps: &[Step]) -> Result<Outcome> {
    let Outcome { mut measured, mut failed } = Outcome::default();
    let mut open = steps.to_vec();
    let mut tries: Vec<(Step, usize)> = Vec::new();
    while !open.is_empty() {
        let round = round(stage, clock, &open, &mut measured)?;
        open.retain(|step| !measured.iter().any(|(done, _)| done == step));
        for (step, why) in round {
            let count = tries.iter().filter(|(tried, _)| *tried == step).count() + 1;
            tries.push((step, count));
            eprintln!("  {step:?}: {why}");
            // What has failed comes last, so that it holds nothing else up.
            open.retain(|other| *other != step);
            if count >= TRIES {
                failed.push(format!("{step:?}: {why}"));
            } else {
                open.push(step);
            }
        }
    }
    Ok(Outcome { measured, failed })
}

/// One level 1: carries out as many steps as it can; returns those that failed.
fn round(
    stage: &Stage,
    clock: Clock,
    steps: &[Step],
    measured: &mut Vec<(Step, Measured)>,
) -> Result<Vec<(Step, String)>> {
    let dir = tempfile::tempdir()?;
    let started = Instant::now();
    let level1 = Private::start(clock, dir.path())?;
    eprintln!("  level 1 ready after {:.1} s", started.elapsed().as_secs_f32());
    let plan = Plan {
        steps: steps.to_vec(),
        dir: DIR.into(),
        modules: stage.modules.clone(),
        boot_timeout: boot_timeout(clock),
    };
    std::fs::write(stage.dir.join("plan.json"), serde_json::to_vec(&plan)?)?;
    let copy = format!(
        "mkdir {DIR} && mount -t tmpfs aconite-bench {DIR} && cp -rL {}/. {DIR}",
        stage.dir.display()
    );
    let output = level1.client().exec(exec(stage, &["sh", "-c", &copy]))?.output()?;
    if !output.status.success() {
        bail!("Cannot copy the files into level 1: {}", String::from_utf8_lossy(&output.stderr));
    }
    let (process, lines) = start(stage, level1.client())?;
    let mut failed = Vec::new();
    let mut current: Option<(Step, Instant)> = None;
    loop {
        let patience = match current {
            None => PAUSE,
            Some((
                Step::Pmem { .. }
                | Step::Clean { .. }
                | Step::Add { .. }
                | Step::Cycles { .. }
                | Step::Disk { .. }
                | Step::Scrub { .. },
                _,
            )) => LONG_STEP,
            Some(_) => STEP,
        };
        match lines.recv_timeout(patience) {
            Ok(Line::Begin(step)) => current = Some((step, Instant::now())),
            Ok(Line::Done(step, result)) => {
                let took = current.take().map_or(Duration::ZERO, |(_, at)| at.elapsed());
                eprintln!("  {step:?}: {:.1} s", took.as_secs_f32());
                measured.push((step, result));
            }
            Ok(Line::Failed(step, why)) => {
                current = None;
                failed.push((step, why));
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let (step, _) = current.context("Level 1 does not answer")?;
                failed.push((step, format!("no end within {patience:?}")));
                return Ok(failed);
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    let status = process.wait_timeout(PAUSE)?;
    match current {
        Some((step, _)) => failed.push((step, format!("the program in level 1 ended ({status:?})"))),
        None if !status.is_some_and(|status| status.success()) && failed.is_empty() => {
            bail!("The program in level 1 ended ({status:?})")
        }
        None => {}
    }
    Ok(failed)
}

/// How long a guest may take to reach user space. Under the instruction clock it takes 3 s or hangs, and a second of
/// a guest that spins takes several of the host's.
fn boot_timeout(clock: Clock) -> Duration {
    match clock {
        Clock::Wall => Duration::from_secs(90),
        Clock::Instructions => Duration::from_secs(12),
    }
}

fn exec(stage: &Stage, argv: &[&str]) -> Exec {
    let material = [b"ACONITE_MATERIAL=", stage.material.as_os_str().as_bytes()].concat();
    let path = b"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_vec();
    Exec {
        argv: argv.iter().map(|word| word.as_bytes().to_vec()).collect(),
        env: vec![material, path],
        ..Exec::default()
    }
}

/// Starts the inside part; returns what it says.
fn start(stage: &Stage, client: &Client) -> Result<(Process, Receiver<Line>)> {
    let program = Path::new(DIR).join("bench");
    let plan = Path::new(DIR).join("plan.json");
    let argv = [&*program.to_string_lossy(), crate::INSIDE, &*plan.to_string_lossy()];
    let mut process = client.exec(exec(stage, &argv))?;
    let stdout = process.take_stdout().context("No output of the program in level 1")?;
    let stderr = process.take_stderr().context("No errors of the program in level 1")?;
    std::thread::spawn(move || {
        let mut text = String::new();
        // What cannot be read is not shown.
        let _ = BufReader::new(stderr).read_to_string(&mut text);
        eprint!("{text}");
    });
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for text in BufReader::new(stdout).lines().map_while(Result::ok) {
            match serde_json::from_str(&text) {
                Ok(line) => {
                    if sender.send(line).is_err() {
                        return;
                    }
                }
                Err(error) => eprintln!("  {error} in {text}"),
            }
        }
    });
    Ok((process, lines))
}
