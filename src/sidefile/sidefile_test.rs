use aconite_devices::nvdimm::Record;
use proptest::prelude::*;

use super::*;

const SIZE: u64 = 1 << 30;

struct Place {
    _dir: tempfile::TempDir,
    device: PathBuf,
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    let device = dir.path().join("p0.img");
    Place { _dir: dir, device }
}

impl Place {
    fn open(&self) -> SideFile {
        SideFile::open(&self.device, SIZE, false).unwrap()
    }

    fn refused(&self) -> Damage {
        let before = fs::read(self.path()).unwrap();
        for error in [
            SideFile::open(&self.device, SIZE, false).unwrap_err(),
            SideFile::read(&self.device, SIZE).unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(text.contains(self.path().to_str().unwrap()) && text.contains("move it away"), "{text}");
            let SideFileError::Damaged { damage, .. } = error else { panic!("{error:?}") };
            assert_eq!(fs::read(self.path()).unwrap(), before, "it stays as it is");
            if self.path().exists() {
                return damage;
            }
        }
        unreachable!("the file is gone")
    }

    fn path(&self) -> PathBuf {
        SideFile::path_of(&self.device)
    }
}

/// The 64 bytes from an offset on.
fn line(offset: u64) -> std::ops::Range<u64> {
    offset..offset + 64
}

/// The n-th record of a DIMM.
fn record(n: u8) -> Record {
    let mut bytes = Record::default().to_bytes();
    *bytes.last_mut().unwrap() = n;
    Record::from_bytes(&bytes).unwrap()
}

fn labels(offset: u64, bytes: &[u8]) -> Change {
    Change::Labels { dimm: 0, size: 4096, offset, bytes: bytes.to_vec() }
}

fn remembered(dimm: u32, n: u8) -> Change {
    Change::Dimm { dimm, record: Box::new(record(n)) }
}

#[test]
fn nothing_is_made_before_there_is_something_to_keep() {
    let place = place();
    assert_eq!(place.open().content(), Content::default());
    assert_eq!(SideFile::read(&place.device, SIZE).unwrap(), Content::default());
    assert!(!place.path().exists());
    place.open().keep(&Change::Poisoned(vec![line(0)])).unwrap();
    assert!(place.path().exists());
    assert_eq!(place.path().file_name().unwrap(), "p0.img.aconite");
}

#[test]
fn what_was_kept_is_there_again() {
    let place = place();
    let side = place.open();
    side.keep(&labels(256, b"abc")).unwrap();
    side.keep(&remembered(2, 7)).unwrap();
    side.keep(&Change::Poisoned(vec![0..128, 4096..4160])).unwrap();
    side.keep(&Change::Cleaned(vec![line(64)])).unwrap();
    drop(side);
    let content = place.open().content();
    assert_eq!(content, SideFile::read(&place.device, SIZE).unwrap());
    assert_eq!(content.poison.iter().collect::<Vec<_>>(), [0..64, 4096..4160]);
    let area = content.dimm(0).labels.unwrap();
    assert_eq!((area.len(), &area[254..260]), (4096, &b"\0\0abc\0"[..]));
    let records: Vec<_> = (0..4).map(|dimm| content.dimm(dimm).record).collect();
    assert_eq!(records, [None, None, Some(record(7)), None]);
    assert_eq!(content.dimms.len(), 3);
}

#[test]
fn every_byte_of_a_file_is_as_documented() {
    let place = place();
    place.open().keep(&Change::Poisoned(vec![line(64)])).unwrap();
    let bytes = fs::read(place.path()).unwrap();
    assert_eq!(bytes[..12], *b"aconite-pmem");
    assert_eq!(bytes[12..16], 2u32.to_le_bytes());
    assert_eq!(bytes[16..24], SIZE.to_le_bytes());
    // No DIMM, one range.
    let content = [0u64, 1, 64, 128].map(u64::to_le_bytes).concat();
    assert_eq!(bytes[24..32], 32u64.to_le_bytes());
    assert_eq!(bytes[32..40], (72 + 32 + (256u64 << 10)).to_le_bytes());
    assert_eq!(bytes[72..104], content);
    assert!(bytes[104..].iter().all(|byte| *byte == 0));
    assert_eq!(bytes.len(), 72 + 32 + (256 << 10));
    // The next change goes into the journal.
    place.open().keep(&Change::Cleaned(vec![line(64)])).unwrap();
    let after = fs::read(place.path()).unwrap();
    assert_eq!(after[..104], bytes[..104]);
    assert_eq!(after[104..108], 24u32.to_le_bytes());
    assert_eq!(after[120..144], [4u64, 64, 128].map(u64::to_le_bytes).concat());
    assert_eq!(after.len(), bytes.len());
}

/// A file of version 1, which knows one DIMM, with labels in its content and a record in its journal.
fn of_version_1() -> Vec<u8> {
    use sha2::{Digest, Sha256};
    let (record, poison) = (record(7).to_bytes(), [1u64, 64, 128].map(u64::to_le_bytes).concat());
    let mut content = 5u64.to_le_bytes().to_vec();
    content.extend(b"abcd");
    content.extend(0u64.to_le_bytes());
    content.extend(poison);
    let mut file = b"aconite-pmem\x01\0\0\0".to_vec();
    let length = 72 + content.len() as u64 + (256 << 10);
    [SIZE, content.len() as u64, length].into_iter().for_each(|n| file.extend(n.to_le_bytes()));
    let digest = Sha256::digest([file.as_slice(), &content].concat());
    file.extend(digest);
    file.extend(content);
    let change = [2u64.to_le_bytes().as_slice(), &record].concat();
    let place = (file.len() as u64).to_le_bytes();
    let check = |bytes: &[u8]| Sha256::digest([digest.as_slice(), &place, bytes].concat());
    let count = (change.len() as u32).to_le_bytes();
    file.extend(count);
    file.extend(&check(&count)[..4]);
    file.extend(&check(&change)[..8]);
    file.extend(change);
    file.resize(length as usize, 0);
    file
}

#[test]
fn a_file_of_version_1_is_read_and_becomes_one_of_version_2() {
    let place = place();
    fs::write(place.path(), of_version_1()).unwrap();
    let before = place.open().content();
    let dimm = DimmContent { labels: Some(b"abcd".to_vec()), record: Some(record(7)) };
    assert_eq!((&before.dimms, before.poison.iter().next()), (&vec![dimm.clone()], Some(64..128)));
    assert_eq!(fs::read(place.path()).unwrap(), of_version_1(), "it stays until there is something to keep");
    place.open().keep(&remembered(1, 9)).unwrap();
    assert_eq!(fs::read(place.path()).unwrap()[12], 2);
    let after = place.open().content();
    assert_eq!((after.dimm(0), after.dimm(1).record), (dimm, Some(record(9))));
}

#[test]
fn damaged_files_are_refused_by_name_and_stay() {
    let place = place();
    let side = place.open();
    side.keep(&labels(0, &[1; 300])).unwrap();
    side.keep(&labels(300, &[2; 300])).unwrap();
    side.keep(&labels(600, &[3; 300])).unwrap();
    drop(side);
    let good = fs::read(place.path()).unwrap();
    let refused = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        fs::write(place.path(), bytes).unwrap();
        place.refused()
    };
    assert_eq!(refused(&|bytes| bytes[0] = b'A'), Damage::Magic);
    assert_eq!(refused(&|bytes| bytes.clear()), Damage::Magic);
    assert_eq!(refused(&|bytes| bytes[12] = 9), Damage::Version { found: 9, newest: 2 });
    assert_eq!(
        refused(&|bytes| bytes[16..24].copy_from_slice(&(SIZE * 2).to_le_bytes())),
        Damage::DeviceSize { found: SIZE * 2, expected: SIZE }
    );
    let length = good.len() as u64;
    assert_eq!(refused(&|bytes| bytes.truncate(20)), Damage::Length { found: 20, expected: 72 });
    assert_eq!(
        refused(&|bytes| bytes.truncate(bytes.len() - 1)),
        Damage::Length { found: length - 1, expected: length }
    );
    assert_eq!(refused(&|bytes| bytes.push(0)), Damage::Length { found: length + 1, expected: length });
    assert_eq!(refused(&|bytes| bytes[100] ^= 1), Damage::Checksum, "in the content");
    let journal = 72 + good[24..32].iter().rev().fold(0, |n, byte| n << 8 | usize::from(*byte));
    assert_eq!(refused(&|bytes| bytes[journal + 40] ^= 1), Damage::Checksum, "in an entry before the last");
    fs::write(place.path(), &good).unwrap();
    assert!(SideFile::open(&place.device, SIZE, false).is_ok());
}

#[test]
fn a_file_of_another_size_and_one_left_over_are_refused() {
    let place = place();
    place.open().keep(&remembered(0, 1)).unwrap();
    let error = SideFile::open(&place.device, SIZE / 2, false).unwrap_err().to_string();
    assert!(
        error.contains("it belongs to a device of 1073741824 bytes, and this one has 536870912"),
        "{error}"
    );
    let error = SideFile::open(&place.device, SIZE, true).unwrap_err();
    assert!(matches!(error, SideFileError::LeftOver { .. }), "{error:?}");
    assert!(place.path().exists());
}

#[test]
fn an_entry_that_is_not_whole_counts_for_nothing() {
    let place = place();
    place.open().keep(&Change::Poisoned(vec![line(0)])).unwrap();
    place.open().keep(&Change::Poisoned(vec![line(128)])).unwrap();
    let whole = fs::read(place.path()).unwrap();
    let start = 72 + 32;
    let last = whole.iter().rposition(|byte| *byte != 0).unwrap();
    assert!(last > start + 16 + 8);
    for cut in start..=last {
        let mut bytes = whole.clone();
        bytes[cut..].fill(0);
        fs::write(place.path(), &bytes).unwrap();
        let side = place.open();
        assert_eq!(side.content().poison.iter().collect::<Vec<_>>(), std::slice::from_ref(&(0..64)), "{cut}");
        // What is kept next does not join the torn end.
        side.keep(&Change::Poisoned(vec![line(256)])).unwrap();
        drop(side);
        let again: Vec<_> = place.open().content().poison.iter().collect();
        assert_eq!(again, [0..64, 256..320], "{cut}");
    }
}

#[test]
fn a_full_journal_ends_in_a_new_file() {
    let place = place();
    let side = place.open();
    let mut largest = 0;
    for step in 0..2000u64 {
        side.keep(&labels(step % 3000, &step.to_le_bytes().repeat(100))).unwrap();
        largest = largest.max(fs::metadata(place.path()).unwrap().len());
    }
    assert!(largest < 600 << 10, "{largest}");
    let content = side.content();
    drop(side);
    assert_eq!(place.open().content(), content);
    assert!(!with_suffix(&place.path(), TEMPORARY).exists());
}

#[test]
fn poison_outside_the_device_is_refused() {
    let place = place();
    place.open().keep(&Change::Poisoned(vec![line(SIZE - 32)])).unwrap();
    assert!(matches!(place.refused(), Damage::Content(_)));
    fs::remove_file(place.path()).unwrap();
    place.open().keep(&Change::Poisoned(vec![line(1)])).unwrap();
    assert!(matches!(place.refused(), Damage::Content(_)));
}

#[test]
fn what_a_killed_monitor_left_half_written_is_cleared_away() {
    let place = place();
    fs::write(with_suffix(&place.path(), TEMPORARY), b"half").unwrap();
    place.open();
    assert!(!with_suffix(&place.path(), TEMPORARY).exists());
}

fn change() -> impl Strategy<Value = Change> {
    let lines = prop::collection::vec((0u64..64, 1u64..5), 0..4)
        .prop_map(|lines| lines.into_iter().map(|(line, n)| line * 64..(line + n) * 64).collect::<Vec<_>>());
    prop_oneof![
        (0u64..4000, prop::collection::vec(any::<u8>(), 0..90))
            .prop_map(|(offset, bytes)| labels(offset, &bytes)),
        (0u32..4, any::<u8>()).prop_map(|(dimm, n)| remembered(dimm, n)),
        lines.clone().prop_map(Change::Poisoned),
        lines.prop_map(Change::Cleaned),
    ]
}

/// Changes the byte that `at` chooses among those in use, after `steps`.
fn changed_byte_is_answered(
    steps: Vec<Change>,
    at: impl FnOnce(usize) -> usize,
    xor: u8,
) -> Result<(), TestCaseError> {
    let place = place();
    let mut states = vec![Content::default()];
    let side = place.open();
    for change in steps {
        side.keep(&change).unwrap();
        states.push(side.content());
    }
    drop(side);
    let mut bytes = fs::read(place.path()).unwrap();
    let used = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    bytes[at(used)] ^= xor;
    fs::write(place.path(), bytes).unwrap();
    if let Ok(content) = SideFile::read(&place.device, SIZE) {
        let recent = states[states.len() - 2..].contains(&content);
        prop_assert!(recent, "{:?}", content);
    }
    Ok(())
}

/// Found by the property below.
#[test]
fn a_changed_byte_of_an_older_step_is_answered() {
    let steps = vec![
        Change::Poisoned(vec![704..768, 0..64]),
        Change::Poisoned(vec![0..64, 0..64, 0..128]),
        Change::Cleaned(vec![128..192, 128..192]),
        Change::Cleaned(vec![]),
    ];
    let at = |used: usize| ((used as u128 * 8_649_022_862_398_617_608) >> 64) as usize;
    changed_byte_is_answered(steps, at, 128).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// The file is the sum of all changes, wherever it is opened anew.
    #[test]
    fn reopened_files_have_all_changes(steps in prop::collection::vec((change(), any::<bool>()), 1..20)) {
        let place = place();
        let mut model = Content::default();
        let mut side = place.open();
        for (change, reopen) in steps {
            side.keep(&change).unwrap();
            change.apply(&mut model);
            if reopen {
                drop(side);
                side = place.open();
            }
            prop_assert_eq!(&side.content(), &model);
        }
    }

    /// No bytes make the reader panic, and none that differ from a sound file in one place are taken for another state
    /// than the last or the last but one.
    #[test]
    fn any_change_of_a_byte_is_answered(
        steps in prop::collection::vec(change(), 1..6), at in any::<prop::sample::Index>(), xor in 1u8..,
    ) {
        changed_byte_is_answered(steps, |used| at.index(used), xor)?;
    }

    #[test]
    fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..300), ours in any::<bool>()) {
        let place = place();
        let bytes = if ours { [&b"aconite-pmem\x01\0\0\0"[..], &bytes].concat() } else { bytes };
        fs::write(place.path(), bytes).unwrap();
        prop_assert!(SideFile::open(&place.device, SIZE, false).is_err());
    }
}
