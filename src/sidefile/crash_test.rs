//! A writer is killed at 1 000 random moments, and what is left is what it had acknowledged, with all or nothing of
//! the change it was at.

use std::env;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use super::{Change, Content, SideFile};

const SIZE: u64 = 1 << 30;
const KILLS: u64 = 1000;
/// Directory of the writer; without it there is none.
const DIRECTORY: &str = "ACONITE_TEST_SIDE_FILE";

fn device(dir: &Path) -> PathBuf {
    dir.join("device")
}

/// Numbers that look random.
fn mix(n: u64) -> u64 {
    let mut n = n.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    n ^= n >> 32;
    n.wrapping_mul(0xD6E8_FEB8_6659_FD93) >> 16
}

/// The n-th change, and the same in every process.
fn change(n: u64) -> Change {
    let random = mix(n);
    match random % 4 {
        0 | 1 => {
            let length = 1 + random / 4 % 3840;
            let bytes = n.to_le_bytes().repeat(480)[..length as usize].to_vec();
            Change::Labels { dimm: (n % 3) as u32, size: 16 << 10, offset: mix(random) % 8192, bytes }
        }
        2 => Change::Poisoned((0..8).map(|i| mix(n + i) % 4096 * 64).map(|at| at..at + 64).collect()),
        _ => {
            let half = mix(random) % 2048 * 64;
            Change::Cleaned(vec![0..half, half + 64..262_144])
        }
    }
}

/// Not a test of its own: the process that is killed. It goes on where the last one was, and notes each change that
/// has been acknowledged.
#[test]
fn writer() {
    let Some(dir) = env::var_os(DIRECTORY).map(PathBuf::from) else { return };
    let notes = File::options().read(true).write(true).open(dir.join("notes")).unwrap();
    let mut note = [0; 8];
    notes.read_exact_at(&mut note, 0).unwrap();
    let side = SideFile::open(&device(&dir), SIZE, false).unwrap();
    for n in u64::from_le_bytes(note).. {
        side.keep(&change(n)).unwrap();
        notes.write_all_at(&(n + 1).to_le_bytes(), 0).unwrap();
    }
}

#[test]
fn a_kill_leaves_the_old_or_the_new() {
    let dir = tempfile::tempdir().unwrap();
    let notes = dir.path().join("notes");
    std::fs::write(&notes, 0u64.to_le_bytes()).unwrap();
    let (mut model, mut done) = (Content::default(), 0u64);
    let mut unacknowledged = 0;
    for kill in 0..KILLS {
        let mut writer = Command::new(env::current_exe().unwrap())
            .args(["--exact", "sidefile::crash_test::writer"])
            .env(DIRECTORY, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_micros(2000 + mix(kill) % 20_000));
        writer.kill().unwrap();
        writer.wait().unwrap();

        let noted = u64::from_le_bytes(std::fs::read(&notes).unwrap().try_into().unwrap());
        while done < noted {
            change(done).apply(&mut model);
            done += 1;
        }
        let found = SideFile::read(&device(dir.path()), SIZE).unwrap();
        if found != model {
            // It was on the disk, and the writer had no time to say so.
            change(done).apply(&mut model);
            assert_eq!(found, model, "kill {kill} after {noted} changes");
            done += 1;
            unacknowledged += 1;
            std::fs::write(&notes, done.to_le_bytes()).unwrap();
        }
    }
    assert!(done > KILLS, "only {done} changes in {KILLS} runs");
    println!("{done} changes, {unacknowledged} of them on the disk without a note");
}
