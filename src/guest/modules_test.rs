use super::*;

/// An ELF file of two sections: `.modinfo` with these fields, and the names.
pub fn module(fields: &[&str]) -> Vec<u8> {
    let info: Vec<u8> = fields.iter().flat_map(|field| field.bytes().chain([0])).collect();
    let names = b"\0.modinfo\0.shstrtab\0";
    let (info_at, names_at) = (64, 64 + info.len());
    let table_at = names_at + names.len();
    let mut bytes = vec![0; 64];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[0x12] = 62;
    bytes[0x28..0x30].copy_from_slice(&(table_at as u64).to_le_bytes());
    bytes[0x3A] = 64;
    bytes[0x3C] = 3;
    bytes[0x3E] = 2;
    bytes.extend_from_slice(&info);
    bytes.extend_from_slice(names);
    for (name, at, size) in [(0u32, 0, 0), (1, info_at, info.len()), (10, names_at, names.len())] {
        let mut header = [0; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[0x18..0x20].copy_from_slice(&(at as u64).to_le_bytes());
        header[0x20..0x28].copy_from_slice(&(size as u64).to_le_bytes());
        bytes.extend_from_slice(&header);
    }
    bytes
}

fn tree(files: &[(&str, &[&str])], builtin: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (path, fields) in files {
        let path = directory.path().join("kernel").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, module(fields)).unwrap();
    }
    fs::write(directory.path().join("modules.builtin"), builtin).unwrap();
    directory
}

fn names(modules: &[Module]) -> Vec<&str> {
    modules.iter().map(|module| module.name.as_str()).collect()
}

#[test]
fn algorithms_have_providers_under_both_names() {
    let files: [(&str, &[&str]); 2] = [
        ("fs/ext4.ko", &["softdep=pre: crypto-crc32c"]),
        ("crypto/crc32c_generic.ko", &["alias=crypto-crc32c"]),
    ];
    let directory = tree(&files, "");
    let mut modules = Vec::new();
    ModuleTree::open(directory.path()).unwrap().add("ext4", &mut modules).unwrap();
    assert_eq!(names(&modules), ["crc32c_generic", "ext4"]);
}

#[test]
fn dependencies_come_first_and_once() {
    let directory = tree(
        &[
            ("fs/top.ko", &["depends=mid-a,mid_b,vital", "alias=fs-top"]),
            ("lib/mid-a.ko", &["depends=low", "softdep=pre: crc32c post: late"]),
            ("lib/mid_b.ko", &["depends=low", "softdep=pre: crypto-crc32c"]),
            ("lib/low.ko", &["depends="]),
            ("lib/late.ko", &["depends=mid_a"]),
            ("crypto/crc32c-intel.ko", &["depends="]),
        ],
        "kernel/vital.ko\nkernel/in-side.ko\n",
    );
    let tree = ModuleTree::open(directory.path()).unwrap();
    let mut modules = Vec::new();
    tree.add("top", &mut modules).unwrap();
    tree.add("mid-b", &mut modules).unwrap();
    tree.add("in_side", &mut modules).unwrap();
    assert_eq!(names(&modules), ["low", "crc32c_intel", "mid_a", "late", "mid_b", "top"]);
    assert_eq!(modules[2].path, Path::new("kernel/lib/mid-a.ko"));
    let (dependencies, aliases) = index(&modules);
    assert_eq!(aliases, "alias fs-top top\n");
    let line = dependencies.lines().last().unwrap();
    assert_eq!(line, "kernel/fs/top.ko: kernel/lib/mid-a.ko kernel/lib/mid_b.ko kernel/lib/low.ko");
    assert!(tree.has("vital") && tree.has("mid-b") && !tree.has("nothing"));
}

#[test]
fn a_missing_module_is_named_with_who_needs_it() {
    let directory = tree(&[("a.ko", &["depends=b"]), ("c.ko", &[])], "");
    let tree = ModuleTree::open(directory.path()).unwrap();
    let text = tree.add("a", &mut Vec::new()).unwrap_err().to_string();
    assert!(text.contains("`b`") && text.contains("needed by `a`") && text.contains("--modules"), "{text}");
    let text = tree.add("nfit", &mut Vec::new()).unwrap_err().to_string();
    assert!(text.contains("`nfit`") && !text.contains("needed by"), "{text}");
}

#[test]
fn circles_and_damage_are_survived() {
    let directory = tree(&[("a.ko", &["softdep=pre: b"]), ("b.ko", &["depends=a"])], "");
    fs::write(directory.path().join("kernel/x.ko"), b"not a module").unwrap();
    fs::write(directory.path().join("kernel/y.ko.xz"), b"not compressed").unwrap();
    let tree = ModuleTree::open(directory.path()).unwrap();
    let mut modules = Vec::new();
    tree.add("a", &mut modules).unwrap();
    assert_eq!(names(&modules), ["b", "a"]);
    assert!(matches!(tree.add("x", &mut modules), Err(ModuleError::NotAModule(_))));
    assert!(matches!(tree.add("y", &mut modules), Err(ModuleError::Read { .. })));
    index(&modules);
}

#[test]
fn modules_are_decompressed() {
    let directory = tree(&[("a.ko", &["depends="])], "");
    let path = directory.path().join("kernel/a.ko");
    let plain = fs::read(&path).unwrap();
    let mut gz = Vec::new();
    flate2::read::GzEncoder::new(&plain[..], flate2::Compression::fast()).read_to_end(&mut gz).unwrap();
    let zst = ruzstd::encoding::compress_to_vec(&plain[..], ruzstd::encoding::CompressionLevel::Fastest);
    for (suffix, bytes) in [("gz", gz), ("zst", zst)] {
        fs::remove_file(&path).ok();
        let path = directory.path().join("kernel").join(format!("a.ko.{suffix}"));
        fs::write(&path, bytes).unwrap();
        let mut modules = Vec::new();
        ModuleTree::open(directory.path()).unwrap().add("a", &mut modules).unwrap();
        assert!(modules[0].image == plain);
        assert_eq!(modules[0].path, Path::new("kernel/a.ko"));
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn modules_are_found_beside_the_image() {
    let root = tempfile::tempdir().unwrap();
    let modules = root.path().join("usr/lib/modules/9.9-test");
    fs::create_dir_all(&modules).unwrap();
    fs::create_dir_all(root.path().join("boot")).unwrap();
    fs::write(modules.join("modules.order"), "").unwrap();
    for image in ["boot/vmlinuz-9.9-test", "vmlinuz"] {
        let image = root.path().join(image);
        fs::write(&image, "").unwrap();
        assert_eq!(find(&image, "9.9-test", None).unwrap(), fs::canonicalize(&modules).unwrap());
    }
    let elsewhere = Path::new("/dev/null");
    assert_eq!(find(elsewhere, "9.9-test", Some(root.path())).unwrap(), modules);
    assert_eq!(find(elsewhere, "x", Some(&modules)).unwrap(), modules);
    let text = find(elsewhere, "9.9-test", None).unwrap_err().to_string();
    assert!(text.contains("9.9-test") && text.contains("--modules"), "{text}");
}
