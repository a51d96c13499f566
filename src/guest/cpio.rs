//! A small file tree and its form as a cpio archive of the "new ASCII" kind, which is what
//! Linux unpacks as its initramfs (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use thiserror::Error;

/// Symbolic links that are followed for one path, as in Linux (MAXSYMLINKS).
const MOST_LINKS: usize = 40;
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMBOLIC_LINK: u32 = 0o120_000;

/// A tree that cannot be made.
#[derive(Debug, Error)]
pub enum TreeError {
    /// The path is not absolute, or leads in circles.
    #[error("{0} is no absolute path in the guest, or its links lead in circles")]
    Path(PathBuf),
    /// Something else is there.
    #[error("The guest's {0} would be both a directory and something else: choose another path")]
    Taken(PathBuf),
    /// Too large for the format.
    #[error("{0} has {1} bytes, and a file of an initramfs has less than 4 GiB: use a disk for it")]
    TooLarge(PathBuf, usize),
}

/// A tree of files in memory. Parents are made as needed, with mode 755.
#[derive(Debug, Default)]
pub struct Tree {
    /// By absolute path with no links in it, so that parents come before what is in them.
    nodes: BTreeMap<PathBuf, Node>,
}

#[derive(Debug)]
enum Node {
    Directory,
    File { mode: u32, data: Vec<u8> },
    Link(PathBuf),
}

impl Tree {
    /// Where `path` is once the links of the tree have been followed; the last component
    /// only if `last`. The path need not exist.
    ///
    /// # Errors
    /// It is not absolute, or leads in circles.
    pub fn resolve(&self, path: &Path, last: bool) -> Result<PathBuf, TreeError> {
        let bad = || TreeError::Path(path.to_path_buf());
        let mut left: Vec<PathBuf> = Vec::new();
        let push = |left: &mut Vec<PathBuf>, path: &Path| {
            left.extend(path.components().rev().map(|part| PathBuf::from(part.as_os_str())));
        };
        if !path.is_absolute() {
            return Err(bad());
        }
        push(&mut left, path);
        let mut found = PathBuf::from("/");
        let mut links = 0;
        while let Some(part) = left.pop() {
            match part.components().next() {
                Some(Component::RootDir) => found = "/".into(),
                Some(Component::ParentDir) => drop(found.pop()),
                Some(Component::Normal(name)) => found.push(name),
                _ => {}
            }
            if let Some(Node::Link(target)) = self.nodes.get(&found).filter(|_| last || !left.is_empty()) {
                links += 1;
                if links > MOST_LINKS {
                    return Err(bad());
                }
                push(&mut left, target);
                found.pop();
            }
        }
        Ok(found)
    }

    /// Something is at this path, links followed.
    pub fn contains(&self, path: &Path) -> bool {
        self.resolve(path, true).is_ok_and(|path| self.nodes.contains_key(&path))
    }

    /// Makes a directory, if it is not there.
    ///
    /// # Errors
    /// Something else is there.
    pub fn directory(&mut self, path: &Path) -> Result<(), TreeError> {
        let path = self.resolve(path, true)?;
        for parent in path.ancestors() {
            match self.nodes.get(parent) {
                None if parent == Path::new("/") => {}
                None => drop(self.nodes.insert(parent.into(), Node::Directory)),
                Some(Node::Directory) => return Ok(()),
                Some(_) => return Err(TreeError::Taken(parent.into())),
            }
        }
        Ok(())
    }

    /// Puts a file, replacing one that is there. `mode` is its permissions.
    ///
    /// # Errors
    /// A directory is there, or the file is too large.
    pub fn file(&mut self, path: &Path, mode: u32, data: Vec<u8>) -> Result<(), TreeError> {
        if u32::try_from(data.len()).is_err() {
            return Err(TreeError::TooLarge(path.into(), data.len()));
        }
        self.put(path, Node::File { mode, data })
    }

    /// Puts a symbolic link, replacing a file that is there.
    ///
    /// # Errors
    /// A directory is there.
    pub fn link(&mut self, path: &Path, target: &Path) -> Result<(), TreeError> {
        self.put(path, Node::Link(target.into()))
    }

    fn put(&mut self, path: &Path, node: Node) -> Result<(), TreeError> {
        let path = self.resolve(path, false)?;
        let parent = path.parent().ok_or_else(|| TreeError::Taken(path.clone()))?;
        self.directory(parent)?;
        if let Some(Node::Directory) = self.nodes.get(&path) {
            return Err(TreeError::Taken(path));
        }
        self.nodes.insert(path, node);
        Ok(())
    }

    /// The archive. The same tree always gives the same bytes.
    pub fn archive(&self) -> Vec<u8> {
        let size = |node: &Node| if let Node::File { data, .. } = node { data.len() } else { 0 };
        let mut out = Vec::with_capacity(self.nodes.values().map(|node| size(node) + 200).sum());
        for (number, (path, node)) in self.nodes.iter().enumerate() {
            let name = path.as_os_str().as_encoded_bytes().strip_prefix(b"/").unwrap_or_default();
            let (mode, links, data) = match node {
                Node::Directory => (DIRECTORY | 0o755, 2, &[][..]),
                Node::File { mode, data } => (REGULAR | (mode & 0o7777), 1, &data[..]),
                Node::Link(target) => (SYMBOLIC_LINK | 0o777, 1, target.as_os_str().as_encoded_bytes()),
            };
            put_entry(&mut out, number as u32 + 1, mode, links, name, data);
        }
        put_entry(&mut out, 0, 0, 1, b"TRAILER!!!", &[]);
        out
    }
}

fn put_entry(out: &mut Vec<u8>, inode: u32, mode: u32, links: u32, name: &[u8], data: &[u8]) {
    // inode, mode, uid, gid, links, time, size, device (2), device of the node (2), name with its zero, checksum
    let name_size = name.len() as u32 + 1;
    let fields = [inode, mode, 0, 0, links, 0, data.len() as u32, 0, 0, 0, 0, name_size, 0];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(name);
    out.push(0);
    pad(out);
    out.extend_from_slice(data);
    pad(out);
}

/// Names and data end at a multiple of four bytes.
fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Reads an archive back: path, mode with its type, data.
    pub fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |at: usize| {
                let digits = std::str::from_utf8(&bytes[6 + 8 * at..14 + 8 * at]).unwrap();
                u32::from_str_radix(digits, 16).unwrap() as usize
            };
            let (mode, size, name_size) = (field(1) as u32, field(6), field(11));
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            assert_eq!(bytes[110 + name_size - 1], 0);
            let start = (110 + name_size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(start, bytes.len());
                return entries;
            }
            entries.push((name, mode, bytes[start..start + size].to_vec()));
            bytes = &bytes[(start + size).next_multiple_of(4)..];
        }
    }

    fn merged() -> Tree {
        let mut tree = Tree::default();
        tree.link(Path::new("/lib64"), Path::new("usr/lib")).unwrap();
        tree.link(Path::new("/usr/lib/x86_64-linux-gnu"), Path::new(".")).unwrap();
        tree
    }

    #[test]
    fn links_of_the_tree_are_followed() {
        let mut tree = merged();
        tree.file(Path::new("/lib64/x86_64-linux-gnu/libc.so.6"), 0o755, b"c".to_vec()).unwrap();
        assert!(tree.contains(Path::new("/usr/lib/libc.so.6")));
        assert!(tree.contains(Path::new("/lib64/../lib/libc.so.6")));
        let entries = read(&tree.archive());
        let names: Vec<_> = entries.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, ["lib64", "usr", "usr/lib", "usr/lib/libc.so.6", "usr/lib/x86_64-linux-gnu"]);
        assert_eq!(entries[0], ("lib64".into(), 0o120_777, b"usr/lib".to_vec()));
        assert_eq!(entries[3], ("usr/lib/libc.so.6".into(), 0o100_755, b"c".to_vec()));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let mut tree = merged();
        tree.link(Path::new("/a"), Path::new("/b")).unwrap();
        tree.link(Path::new("/b"), Path::new("a")).unwrap();
        assert!(matches!(tree.file(Path::new("/a/x"), 0, vec![]), Err(TreeError::Path(_))));
        assert!(matches!(tree.file(Path::new("x"), 0, vec![]), Err(TreeError::Path(_))));
        assert!(matches!(tree.file(Path::new("/usr"), 0, vec![]), Err(TreeError::Taken(_))));
        assert!(matches!(tree.file(Path::new("/"), 0, vec![]), Err(TreeError::Taken(_))));
        tree.file(Path::new("/f"), 0, vec![]).unwrap();
        assert!(matches!(tree.file(Path::new("/f/g"), 0, vec![]), Err(TreeError::Taken(_))));
    }

    proptest! {
        #[test]
        fn files_come_back(files in prop::collection::btree_map("[a-z]{1,9}", prop::collection::vec(any::<u8>(), 0..99), 0..9)) {
            let mut tree = Tree::default();
            for (name, data) in &files {
                tree.file(&Path::new("/d").join(name), 0o640, data.clone()).unwrap();
            }
            let mut seen = read(&tree.archive());
            if !files.is_empty() {
                prop_assert_eq!(seen.remove(0), ("d".to_string(), 0o040_755, vec![]));
            }
            let expected: Vec<_> =
                files.into_iter().map(|(name, data)| (format!("d/{name}"), 0o100_640, data)).collect();
            prop_assert_eq!(seen, expected);
        }
    }
}
