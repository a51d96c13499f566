use super::super::cpio::tests::read as read_archive;
use super::super::modules::tests::module;
use super::*;
use std::collections::BTreeMap;

fn unpack(bytes: &[u8]) -> BTreeMap<String, (u32, Vec<u8>)> {
    read_archive(bytes).into_iter().map(|(name, mode, data)| (name, (mode, data))).collect()
}

/// A root with a busybox that can only say what it would do.
fn root_with_busybox() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let bin = root.path().join("usr/bin");
    fs::create_dir_all(&bin).unwrap();
    let busybox = bin.join("busybox");
    fs::write(&busybox, "#!/bin/sh\nprintf 'bin/sh\\nbin/cat\\nusr/bin/env\\nsbin/modprobe\\nbin/tool\\n'\n")
        .unwrap();
    fs::set_permissions(&busybox, fs::Permissions::from_mode(0o755)).unwrap();
    root
}

fn with_busybox(root: &tempfile::TempDir) -> Contents {
    Contents { busybox: true, roots: vec![root.path().into()], ..Contents::empty(None) }
}

fn executable(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn the_agent_is_init() {
    let packed = pack(&Contents::empty(None)).unwrap();
    let files = unpack(&packed.bytes);
    assert_eq!(files["init"], (0o100_755, AGENT.to_vec()));
    assert_eq!(files["lib64"], (0o120_777, b"usr/lib".to_vec()));
    assert!(files.contains_key("proc") && files.contains_key("dev"));
    assert!(!files.contains_key("etc/aconite/shares"));
    assert_eq!(
        files["usr/bin/aconite-agent"],
        (0o120_777, b"/init".to_vec()),
        "the program of the workloads"
    );
    let workload = Contents { command: Some("aconite-agent".into()), ..Contents::empty(None) };
    assert_eq!(pack(&workload).unwrap().command.as_deref(), Some(Path::new("aconite-agent")));
}

#[test]
fn applets_are_links_unless_a_program_is_named() {
    let root = root_with_busybox();
    executable(&root.path().join("usr/bin/tool"), "#!/bin/sh\n");
    let mut contents = with_busybox(&root);
    let files = unpack(&pack(&contents).unwrap().bytes);
    for applet in ["usr/bin/sh", "usr/sbin/modprobe", "usr/bin/tool"] {
        assert!(files[applet] == (0o120_777, b"/usr/bin/busybox".to_vec()), "{applet}");
    }
    contents.programs = vec!["tool".into()];
    let files = unpack(&pack(&contents).unwrap().bytes);
    assert_eq!(files["usr/bin/tool"], (0o100_755, b"#!/bin/sh\n".to_vec()));
}

#[test]
fn the_command_is_packed_if_busybox_does_not_have_it() {
    let root = root_with_busybox();
    let command = |command: &Path| {
        let contents = Contents { command: Some(command.into()), ..with_busybox(&root) };
        let packed = pack(&contents)?;
        Ok::<_, PackError>((packed.command.unwrap(), unpack(&packed.bytes)))
    };
    assert_eq!(command(Path::new("cat")).unwrap().0, Path::new("cat"));
    assert_eq!(command(Path::new("/bin/sh")).unwrap().0, Path::new("/bin/sh"));
    let script = root.path().join("somewhere/script");
    executable(&script, "#!/usr/bin/env sh\n");
    let (name, files) = command(&script).unwrap();
    assert!(name.ends_with("somewhere/script"), "{}", name.display());
    assert!(files.keys().any(|path| path.ends_with("somewhere/script")));
    let (name, files) = command(Path::new("dpkg")).unwrap();
    assert!(files.keys().any(|path| path.ends_with("usr/bin/dpkg")), "{}", name.display());
    assert!(files.contains_key("usr/lib/libc.so.6") && files.contains_key("usr/lib/ld-linux-x86-64.so.2"));
    let text = command(Path::new("no-such-program")).unwrap_err().to_string();
    assert!(text.contains("`no-such-program`"), "{text}");
    let data = root.path().join("data");
    executable(&data, "neither");
    assert!(matches!(command(&data), Err(PackError::NotAProgram(_))));
}

#[test]
fn files_shares_and_modules_are_packed() {
    let directory = tempfile::tempdir().unwrap();
    // Named after nothing: the modules themselves say what they are for.
    let modules = directory.path().join("built");
    const MAGIC: &str = "vermagic=9.9-test SMP preempt mod_unload";
    fs::create_dir_all(modules.join("kernel")).unwrap();
    fs::write(modules.join("modules.builtin"), "kernel/virtio_pci.ko\n").unwrap();
    fs::write(modules.join("kernel/virtio_console.ko"), module(&["depends=", MAGIC])).unwrap();
    fs::write(modules.join("kernel/nfit.ko"), module(&["depends=lib-nd", MAGIC])).unwrap();
    fs::write(modules.join("kernel/lib-nd.ko"), module(&["depends=", MAGIC])).unwrap();
    fs::write(modules.join("kernel/nd_pmem.ko"), module(&["depends=lib_nd", MAGIC])).unwrap();
    fs::write(modules.join("kernel/ext4.ko"), module(&["depends=", "alias=fs-ext4"])).unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "text").unwrap();
    let share = Share { tag: "t".into(), path: b"/a b".to_vec(), options: "ro".into() };
    let contents = Contents {
        busybox: false,
        files: vec![(file, "/opt/file".into())],
        shares: vec![share.clone()],
        ..Contents::guest(Some(modules.clone()))
    };
    let files = unpack(&pack(&contents).unwrap().bytes);
    assert_eq!(files["opt/file"].1, b"text");
    assert_eq!(config::parse_shares(&files["etc/aconite/shares"].1).unwrap(), [share]);
    let list = String::from_utf8(files["etc/aconite/modules"].1.clone()).unwrap();
    let expected = ["virtio_console", "lib-nd", "nfit", "nd_pmem"];
    let expected: Vec<_> =
        expected.iter().map(|name| format!("/lib/modules/9.9-test/kernel/{name}.ko")).collect();
    assert_eq!(list.lines().collect::<Vec<_>>(), expected);
    assert_eq!(files["usr/lib/modules/9.9-test/modules.alias"].1, b"alias fs-ext4 ext4\n");
    assert!(files.contains_key("usr/lib/modules/9.9-test/kernel/ext4.ko"));

    fs::remove_file(modules.join("kernel/nfit.ko")).unwrap();
    let text = pack(&contents).unwrap_err().to_string();
    assert!(text.contains("`nfit`"), "{text}");
}

#[test]
fn no_busybox_is_an_error_with_a_remedy() {
    let root = tempfile::tempdir().unwrap();
    let contents = with_busybox(&root);
    // A host may have one.
    if let Err(error) = pack(&contents) {
        assert!(error.to_string().contains("busybox-static"), "{error}");
    }
    let root = root_with_busybox();
    executable(&root.path().join("usr/bin/busybox"), "#!/bin/false\n");
    assert!(matches!(pack(&with_busybox(&root)), Err(PackError::Busybox(_))));
}

/// Kernels and tools from packages, where they have been fetched.
fn material() -> Option<PathBuf> {
    let material = match std::env::var_os("ACONITE_MATERIAL") {
        Some(material) => PathBuf::from(material),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("target/material"),
    };
    material.join("kernels").is_dir().then_some(material)
}

#[test]
fn stock_kernels_and_tools_are_packed() {
    let Some(material) = material() else {
        eprintln!("skipped: no guest material (cargo xtask fetch)");
        return;
    };
    for kernel in fs::read_dir(material.join("kernels")).unwrap() {
        let image = kernel.unwrap().path().join("vmlinuz");
        let release = crate::guest::kernel_image::release(&image).unwrap();
        let modules = modules::find(&image, &release, None).unwrap();
        assert!(modules.ends_with(&release), "{}", modules.display());
        let contents = Contents {
            roots: vec![material.join("tools")],
            programs: vec!["ndctl".into(), "mkfs.ext4".into()],
            ..Contents::guest(Some(modules))
        };
        let packed = pack(&contents).unwrap();
        assert!(packed.bytes.len() < 24 << 20, "{release}: {} bytes", packed.bytes.len());
        let files = unpack(&packed.bytes);
        let list = String::from_utf8(files["etc/aconite/modules"].1.clone()).unwrap();
        let at = |name: &str| list.lines().position(|line| line.ends_with(&format!("/{name}.ko")));
        assert!(at("libnvdimm").unwrap() < at("nfit").unwrap(), "{list}");
        assert!(at("nd_btt").unwrap() < at("nd_pmem").unwrap(), "{list}");
        for path in list.lines() {
            let (_, image) = &files[&path.replacen("/lib", "usr/lib", 1)];
            assert!(image.starts_with(b"\x7fELF"), "{path}");
        }
        for path in
            ["usr/bin/sh", "usr/bin/ndctl", "usr/sbin/mkfs.ext4", "usr/lib/libndctl.so.6", "etc/mke2fs.conf"]
        {
            assert!(files.contains_key(path), "{path}");
        }
    }
}
