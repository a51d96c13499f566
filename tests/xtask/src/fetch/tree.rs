//! Digests and sizes of directory trees.

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// SHA-256 of a file, in hexadecimal.
pub fn file_digest(path: &Path) -> Result<String> {
    let mut file = fs::File::open(path).with_context(|| format!("Cannot open {}", path.display()))?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).with_context(|| format!("Cannot read {}", path.display()))?;
        if n == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..n]);
    }
}

/// SHA-256 over every path, kind and content below `root`, except the record that the digest is written to.
pub fn digest(root: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    walk(root, root, &mut hash)?;
    Ok(hex(&hash.finalize()))
}

fn walk(root: &Path, dir: &Path, hash: &mut Sha256) -> Result<()> {
    let mut entries = fs::read_dir(dir)
        .and_then(|entries| entries.collect::<Result<Vec<_>, _>>())
        .with_context(|| format!("Cannot read {}", dir.display()))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let name = path.strip_prefix(root).unwrap_or(&path).as_os_str().as_bytes().to_owned();
        if name == crate::manifest::ITEM_FILE.as_bytes() {
            continue;
        }
        let kind = entry.file_type().with_context(|| format!("Cannot look at {}", path.display()))?;
        let content = if kind.is_symlink() {
            let target =
                fs::read_link(&path).with_context(|| format!("Cannot read the link {}", path.display()))?;
            format!("link {}", hex(target.as_os_str().as_bytes()))
        } else if kind.is_dir() {
            "dir".to_owned()
        } else {
            format!("file {}", file_digest(&path)?)
        };
        hash.update(format!("{} {content}\n", hex(&name)));
        if kind.is_dir() {
            walk(root, &path, hash)?;
        }
    }
    Ok(())
}

/// Bytes in the files below `dir`; what vanishes meanwhile counts nothing.
pub fn size(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    entries
        .filter_map(Result::ok)
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => size(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_sees_content_names_and_links() {
        let dir = std::env::temp_dir().join(format!("aconite-tree-{}", std::process::id()));
        fs::create_dir_all(dir.join("sub")).unwrap();
        fs::write(dir.join("sub/a"), "x").unwrap();
        let first = digest(&dir).unwrap();
        fs::write(dir.join(crate::manifest::ITEM_FILE), "record").unwrap();
        assert_eq!(digest(&dir).unwrap(), first, "the record is outside its own digest");
        fs::write(dir.join("sub/a"), "y").unwrap();
        let second = digest(&dir).unwrap();
        assert_ne!(first, second);
        fs::rename(dir.join("sub/a"), dir.join("sub/b")).unwrap();
        assert_ne!(digest(&dir).unwrap(), second);
        assert_eq!(size(&dir), 7);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn known_digest() {
        let path = std::env::temp_dir().join(format!("aconite-digest-{}", std::process::id()));
        fs::write(&path, "abc").unwrap();
        assert_eq!(
            file_digest(&path).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        fs::remove_file(&path).unwrap();
    }
}
