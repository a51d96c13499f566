//! Tests of the description: every mistake with its exact words, merging, and the machine file.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use clap::Parser;
use proptest::prelude::*;

use super::*;
use crate::cli::MachineArgs;
use crate::memory::FullLineStore;
use crate::units::{KIB, MIB};

#[derive(Parser)]
#[command(no_binary_name = true)]
struct Line {
    #[command(flatten)]
    machine: MachineArgs,
    #[arg(last = true)]
    command: Vec<String>,
}

/// Parses and validates a command line, with a kernel if none is named.
fn machine(line: &str) -> Result<Machine, ConfigError> {
    let parsed = Line::try_parse_from(line.split_whitespace()).unwrap_or_else(|error| panic!("{error}"));
    let mut machine = parsed.machine.machine(&parsed.command)?;
    if !line.contains("-k ") && machine.kernel.as_os_str().is_empty() {
        machine.kernel = "vmlinuz".into();
    }
    machine.validate()?;
    Ok(machine)
}

fn refused(line: &str) -> String {
    match machine(line) {
        Ok(_) => panic!("{line} was accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn mistakes_name_thing_value_and_remedy() {
    let cases = [
        ("--cpus 0", "Wrong --cpus 0: a machine has at least one vCPU and at most 64; give --cpus 1 to 64"),
        ("--cpus 65", "Wrong --cpus 65: a machine has at least one vCPU and at most 64; give --cpus 1 to 64"),
        ("--cpus -1", "Wrong --cpus -1: a number of vCPUs was expected; give --cpus 1 to 64"),
        (
            "--memory 1X",
            "Wrong --memory 1X: \"1X\" is not a size; write a whole number with K, M, G or T (powers of 1024), such as 512M or 1GiB",
        ),
        ("--memory 3M", "Wrong --memory 3M: Linux needs at least 64M; give --memory 512M or more"),
        ("--memory 1025M", "Wrong --memory 1025M: it is no multiple of 2M; give --memory 1026M"),
        (
            "--timeout soon",
            "Wrong --timeout soon: \"soon\" is not a time; write seconds or a number with ms, s, m or h, such as 90s or 5m",
        ),
        (
            "--timeout 0",
            "Wrong --timeout 0s: the machine would end before it begins; give a time such as 90s, or leave it out",
        ),
        (
            "--no-agent -- ls",
            "Wrong command \"ls\": nothing in the guest can run it without the agent; leave --no-agent or the command out",
        ),
        (
            "--cpu hypervisor=maybe",
            "Wrong --cpu hypervisor=maybe: this is a switch; give hypervisor=on or hypervisor=off",
        ),
        (
            "--cpu hypervizor=on",
            "Wrong --cpu \"hypervizor\": there is no such key; did you mean \"hypervisor\"? Known: vendor, mca, recovery, lmce, erms, hypervisor, kvmclock, pm_timer",
        ),
        (
            "--cpu vendor=intel,mca=smca",
            "Wrong --cpu vendor=intel,mca=smca: the other vendor's processors report machine checks so; leave one of them out, or give vendor=amd",
        ),
        (
            "--slots nfit=65",
            "Wrong --slots nfit=65 with 0 devices: a machine has at most 64 NFIT units; give --slots nfit=64 or fewer devices",
        ),
        (
            "--slots nfit=two",
            "Wrong --slots nfit=two: a number of units was expected; give nfit=4 or another number up to 64",
        ),
        ("--slots nfit=1,size=1K", "Wrong --slots size=1K: a slot's size is a multiple of 2M; give size=2M"),
        (
            "--slots pcie=31",
            "Wrong --slots pcie=31 with 0 devices behind ports: a machine has at most 30 PCI Express ports; give --slots pcie=30 or fewer devices",
        ),
        (
            "--pmem 1G",
            "Wrong --pmem \"1G\": \"1G\" has no value; write key=value,key=value (a comma inside a value is written twice)",
        ),
        (
            "--pmem id=p0",
            "Wrong --pmem p0: it has neither a file nor a size; give file=PATH, size=SIZE or both",
        ),
        (
            "--pmem size=1G,readnoly=on",
            "Wrong --pmem \"readnoly\": there is no such key; did you mean \"readonly\"? Known: file, size, id, via, type, channel, node, readonly, range, at, bus, dimms, interleave, family, labels, flags, ars, ars_records, clear_unit, full_line_store, unflushed, lie",
        ),
        (
            "--pmem size=1000",
            "Wrong --pmem p0: size 1000: Linux maps persistent memory only in multiples of 2M; give 2M",
        ),
        (
            "--pmem size=0",
            "Wrong --pmem p0: size 0: Linux maps persistent memory only in multiples of 2M; give 2M",
        ),
        (
            "--pmem size=1G,id=0",
            "Wrong --pmem id=0: an id is a letter and then letters, digits, - or _, at most 32, and not \"ram\"; give id=p0 or the like",
        ),
        (
            "--pmem size=1G,id=a --pmem size=1G,id=a",
            "Wrong --pmem id=a: two devices have this id; give each its own id=",
        ),
        (
            "--pmem file=/x,size=1G --pmem file=/x,size=1G",
            "Wrong --pmem p1: file /x: it is the file of device p0 too; give each device its own file",
        ),
        (
            "--pmem size=1G,id=p0,via=e820,labels=init",
            "Wrong --pmem p0: labels: only an NVDIMM is on a DIMM, and has firmware; leave it out, or give via=nfit",
        ),
        (
            "--pmem size=1G,id=p0,via=e820,unflushed=drop",
            "Wrong --pmem p0: unflushed: no guest can flush memory that the E820 map describes; leave it out, or give via=nfit or via=virtio",
        ),
        (
            "--pmem size=1G,id=p0,via=e820,channel=container",
            "Wrong --pmem p0: channel: what the E820 map describes is there for good; leave it out, or give via=nfit or via=virtio",
        ),
        (
            "--pmem size=1G,id=p0,type=7",
            "Wrong --pmem p0: type: only the E820 map has types; leave it out, or give via=e820",
        ),
        (
            "--pmem size=1G,via=e820,type=5",
            "Wrong --pmem type 5: the E820 map has no such type of memory device; give type=7, type=12 or type=soft",
        ),
        (
            "--pmem size=1G,id=p0,via=virtio,channel=container",
            "Wrong --pmem p0: channel: a virtio-pmem device goes through its PCI Express port or its host bridge; give channel=pcie or channel=bridge, or leave it out",
        ),
        (
            "--pmem size=1G,id=p0,channel=pcie",
            "Wrong --pmem p0: channel=pcie: an NVDIMM is no PCI Express device; give channel=container, channel=agent or via=virtio",
        ),
        (
            "--pmem size=1G,id=p0,via=virtio,labels=init",
            "Wrong --pmem p0: labels: only an NVDIMM is on a DIMM, and has firmware; leave it out, or give via=nfit",
        ),
        (
            "--pmem size=1G,id=p0,via=virtio --slots pcie=30",
            "Wrong --slots pcie=30 with 1 devices behind ports: a machine has at most 30 PCI Express ports; give --slots pcie=29 or fewer devices",
        ),
        (
            "--pmem size=1G,via=usb,id=p3",
            "Wrong --pmem p3: via usb: there is no such way; give via=nfit, via=virtio or via=e820",
        ),
        (
            "--pmem size=1G,id=p0,channel=bridge",
            "Wrong --pmem p0: channel=bridge: an NVDIMM is no PCI Express device; give channel=container, channel=agent or via=virtio",
        ),
        (
            "--slots bridge=17",
            "Wrong --slots bridge=17 with 0 devices behind host bridges: a machine has at most 16 host bridges that come and go; give --slots bridge=16 or fewer devices",
        ),
        (
            "--pmem size=1G,via=virtio,channel=bridge --slots bridge=16",
            "Wrong --slots bridge=16 with 1 devices behind host bridges: a machine has at most 16 host bridges that come and go; give --slots bridge=15 or fewer devices",
        ),
        (
            "--slots bridge=many",
            "Wrong --slots bridge=many: a number of host bridges was expected; give bridge=4 or another number up to 16",
        ),
        (
            "--pmem size=1G,channel=door",
            "Wrong --pmem channel door: there is no such channel; give channel=container, channel=agent, channel=pcie, channel=bridge or channel=none",
        ),
        (
            "--pmem size=1G,id=p0,family=hpe",
            "Wrong --pmem p0: family hpe: there is no such family; give family=intel, family=msft or family=none",
        ),
        (
            "--pmem size=1G,unflushed=lost",
            "Wrong --pmem unflushed lost: what was not flushed is kept or dropped when power goes; give unflushed=keep or unflushed=drop",
        ),
        (
            "--pmem size=1G,full_line_store=perhaps",
            "Wrong --pmem full_line_store perhaps: a bad line that is written whole stays bad or becomes good; give full_line_store=keep or full_line_store=clear",
        ),
        (
            "--pmem size=1G,id=p0,ars=soon",
            "Wrong --pmem ars=soon: \"soon\" is not a time; write seconds or a number with ms, s, m or h, such as 90s or 5m",
        ),
        (
            "--pmem size=1G,id=p0,ars_records=169",
            "Wrong --pmem p0: ars_records 169: a status holds no such number of records; give 1 to 168",
        ),
        (
            "--pmem size=1G,id=p0,clear_unit=96",
            "Wrong --pmem p0: clear_unit 96: errors cannot be cleared in such units; give a power of two from 64 to 2M",
        ),
        (
            "--pmem size=1G,flags=not_armed+asleep",
            "Wrong --pmem flags not_armed+asleep: \"asleep\" is no state of a DIMM; join words of save_fail, restore_fail, flush_fail, not_armed, smart_event, smart_notify, map_fail by +",
        ),
        (
            "--pmem size=1G,node=x",
            "Wrong --pmem node=x: a proximity domain is a number; give node=1 or another small number",
        ),
        (
            "--pmem size=1G,at=0x140000001",
            "Wrong --pmem p0: at 0x140000001: Linux maps persistent memory only at multiples of 2M; give at=0x140200000",
        ),
        (
            "--pmem size=1G,at=p9",
            "Wrong --pmem p0: at p9: no device has departed before the machine starts; give a guest-physical address such as at=0x240000000, or leave it out",
        ),
        (
            "--pmem size=1G,at=0x140000000 --pmem size=1G,at=0x160000000",
            "Wrong --pmem p1: at 0x160000000: it would overlap device p0 at 0x140000000 to 0x180000000; give at=0x180000000 or leave it out",
        ),
        (
            "--pmem size=1G,at=0xffffffffffe00000",
            "Wrong --pmem p0: at 0xffffffffffe00000: 1G from there goes past the last address; give a lower address, or leave at= out",
        ),
        (
            "--file x:y",
            "Wrong --file \"x:y\": it needs a file of the host and an absolute path in the guest; write SOURCE:/TARGET, such as ./test.sh:/usr/bin/test.sh",
        ),
    ];
    for (line, words) in cases {
        assert_eq!(refused(line), words, "{line}");
    }
    let error = Machine::default().validate().unwrap_err();
    assert_eq!(
        error.to_string(),
        "Wrong --kernel: no kernel is named; give -k with a bzImage or an x86-64 vmlinux"
    );
    let long = format!("--api-socket /{}", "x".repeat(200));
    assert!(refused(&long).ends_with(
        ": a socket's path has at most 107 bytes; use a shorter path, such as one relative to the working directory"
    ));
}

#[test]
fn what_is_odd_is_only_warned_of() {
    let warnings = |line: &str| -> Vec<String> {
        machine(line).unwrap().validate().unwrap().iter().map(ToString::to_string).collect()
    };
    assert_eq!(warnings("--pmem size=1G"), [""; 0]);
    assert_eq!(
        warnings("--pmem size=34M"),
        [
            "--pmem p0: a device of 34M is too small for mkfs.xfs, which wants 300M; ext4 takes it",
            "--pmem p0: 34M is no multiple of 16M: ndctl leaves the last part unused",
        ]
    );
    assert_eq!(
        warnings("--pmem size=304M"),
        ["--pmem p0: 304M is no multiple of 128M: as system RAM (dax/kmem) the last part stays unused"]
    );
}

#[test]
fn ids_fill_the_gaps() {
    let machine = machine("--pmem size=1G --pmem size=1G,id=p0 --pmem size=1G").unwrap();
    let ids: Vec<&str> = machine.pmem.iter().map(|pmem| pmem.id.as_str()).collect();
    assert_eq!(ids, ["p1", "p0", "p2"]);
}

#[test]
fn the_command_line_goes_over_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("machine.toml");
    fs::write(
        &file,
        "kernel = \"vmlinuz\"\ncpus = 2\nmemory = \"2G\"\ncommand = [\"ls\"]\ntools = [\"ndctl\"]\n\
         [cpu]\nhypervisor = false\n[slots]\nnfit = 2\n[[pmem]]\nfile = \"a.img\"\nsize = \"1G\"\nreadonly = \"on\"\n",
    )
    .unwrap();
    let line = format!("--config {} --cpus 4 --pmem size=512M --cpu pm_timer=off --tool fio", file.display());
    let machine = machine(&line).unwrap();
    assert_eq!(machine.kernel, dir.path().join("vmlinuz"));
    assert_eq!((machine.cpus, machine.memory), (4, Size(2 * GIB)));
    assert_eq!(machine.cpu, Cpu { hypervisor: false, pm_timer: false, ..Cpu::default() });
    assert_eq!((machine.slots.nfit, machine.slots.size), (2, Size(4 * GIB)));
    assert_eq!(machine.tools, ["ndctl", "fio"]);
    assert_eq!(machine.command, ["ls"]);
    let file = PmemSource::File { path: dir.path().join("a.img"), size: Some(Size(GIB)) };
    assert_eq!(machine.pmem[0], Pmem { source: file, readonly: true, ..Pmem::memory("p0", Size(GIB)) });
    assert_eq!(machine.pmem[1], Pmem::memory("p1", Size(512 * MIB)));
}

#[test]
fn mistakes_in_a_machine_file() {
    let words = |text: &str| Machine::from_toml("m.toml", text).unwrap_err().to_string();
    assert_eq!(
        words("cpus = 2\n\nmemroy = \"1G\"\n").split("Known").next().unwrap(),
        "Wrong machine file m.toml, line 3 \"memroy\": there is no such key; did you mean \"memory\"? "
    );
    assert_eq!(
        words("memory = \"1Q\""),
        "Wrong machine file m.toml, line 1 \"1Q\": \"1Q\" is not a size; write a whole number with K, M, G or T \
         (powers of 1024), such as 512M or 1GiB"
    );
    let error = words("cpus = 1\n[[pmem]]\nsize = \"1G\"\nchannel = \"door\"\n");
    assert!(
        error.starts_with("Wrong machine file m.toml, line 2 ") && error.contains("no such channel"),
        "{error}"
    );
    let error = words("cpus = ");
    assert!(error.starts_with("Wrong machine file m.toml, line 1"), "{error}");
    let error = Machine::load(Path::new("/nowhere/m.toml")).unwrap_err().to_string();
    assert_eq!(
        error,
        "Wrong --config /nowhere/m.toml: No such file or directory (os error 2); name a machine file that can be read"
    );
    assert!(Machine::load(Path::new("/")).unwrap_err().to_string().contains("it is a directory"));
}

/// A bzImage header for a kernel whose protected-mode part has `paragraphs` × 16 bytes, cut to `length`.
fn bzimage(paragraphs: u32, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; 5 * 512 + paragraphs as usize * 16];
    bytes[0x1F1] = 4;
    bytes[0x1F4..0x1F8].copy_from_slice(&paragraphs.to_le_bytes());
    bytes[0x1FE..0x200].copy_from_slice(&[0x55, 0xAA]);
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x020F_u16.to_le_bytes());
    bytes[0x20E..0x210].copy_from_slice(&0x400_u16.to_le_bytes());
    bytes[0x236] = 1;
    bytes[0x600..0x60F].copy_from_slice(b"6.12.95+x (a@b)");
    bytes.truncate(length);
    bytes
}

#[test]
fn kernel_files() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let whole = image::inspect(&file("whole", &bzimage(100, usize::MAX))).unwrap();
    assert_eq!(whole, KernelImage { kind: ImageKind::BzImage, version: Some("6.12.95+x".into()) });

    let problem = |path: &Path| image::inspect(path).unwrap_err().problem;
    assert_eq!(problem(&file("cut", &bzimage(100, 3000))), "it is truncated: 3000 bytes of 4160");
    assert_eq!(problem(&file("empty", b"")), "its 0 bytes are neither a bzImage nor an ELF file");
    assert_eq!(problem(&file("text", b"hello")), "its 5 bytes are neither a bzImage nor an ELF file");
    assert_eq!(problem(dir.path()), "it is a directory");
    assert_eq!(problem(&dir.path().join("none")), "No such file or directory (os error 2)");
    let mut old = bzimage(100, usize::MAX);
    old[0x206] = 6;
    assert_eq!(problem(&file("old", &old)), "this bzImage (boot protocol 2.06) has no 64-bit entry");

    let mut elf = vec![0; 64 + 56];
    elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
    elf[18] = 62;
    elf[32] = 64;
    (elf[54], elf[56]) = (56, 1);
    elf[64] = 1;
    elf[64 + 32] = 120;
    assert_eq!(image::inspect(&file("elf", &elf)).unwrap().kind, ImageKind::Elf);
    elf[64 + 32] = 121;
    assert_eq!(problem(&file("elf-cut", &elf)), "it is truncated: only 120 bytes are there");
    elf[18] = 183;
    assert_eq!(problem(&file("elf-arm", &elf)), "it is an ELF file, but not for x86-64");
}

#[test]
fn files_of_devices() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("vmlinuz"), bzimage(100, usize::MAX)).unwrap();
    fs::File::create(dir.path().join("a.img")).unwrap().set_len(GIB).unwrap();
    fs::hard_link(dir.path().join("a.img"), dir.path().join("b.img")).unwrap();
    fs::File::create(dir.path().join("odd.img")).unwrap().set_len(4 * MIB + 4 * KIB).unwrap();
    drop(UnixListener::bind(dir.path().join("socket")).unwrap());
    let at = dir.path().display();
    let check = |line: &str| machine(&format!("-k {at}/vmlinuz {line}")).unwrap().check_host();
    let words = |line: &str| check(line).unwrap_err().to_string().replace(&at.to_string(), "DIR");

    let checked = check(&format!("--pmem file={at}/a.img --pmem file={at}/new.img,size=512M")).unwrap();
    assert_eq!(
        checked.pmem,
        [CheckedPmem { size: Size(GIB), create: false }, CheckedPmem { size: Size(512 * MIB), create: true }]
    );
    assert!(!dir.path().join("new.img").exists(), "checking creates nothing");

    let cases = [
        ("--pmem file=AT", "Wrong --pmem p0: file DIR: it is a directory; name a regular file"),
        (
            "--pmem file=AT/socket",
            "Wrong --pmem p0: file DIR/socket: it is a pipe or a socket; name a regular file",
        ),
        ("--pmem file=/dev/null", "Wrong --pmem p0: file /dev/null: it is a device; name a regular file"),
        (
            "--pmem file=AT/none",
            "Wrong --pmem p0: file DIR/none: there is no such file; name one that exists, or give size=SIZE too and it is created",
        ),
        (
            "--pmem file=AT/none,size=1G,readonly=on",
            "Wrong --pmem p0: file DIR/none: there is no such file, and a read-only one cannot be created; name a file that exists, or leave readonly=on out",
        ),
        (
            "--pmem file=AT/none/x,size=1G",
            "Wrong --pmem p0: file DIR/none: No such file or directory (os error 2); make this directory first, or choose another file",
        ),
        (
            "--pmem file=AT/a.img,size=2G",
            "Wrong --pmem p0: file DIR/a.img: it has 1G (1073741824 bytes), less than size=2G; give size=1G or lengthen it: truncate -s 2G FILE",
        ),
        (
            "--pmem file=AT/odd.img",
            "Wrong --pmem p0: file DIR/odd.img: its length is 4198400 bytes, and Linux maps persistent memory only in multiples of 2M; lengthen it: truncate -s 6M FILE",
        ),
        (
            "--pmem file=AT/a.img --pmem file=AT/b.img",
            "Wrong --pmem p1: file DIR/b.img: it is the file of device p0 too; give each device its own file",
        ),
        ("--pmem file=AT/vmlinuz,size=0x1000", ""),
        ("--initrd AT", "Wrong --initrd DIR: it is a directory; name a regular file"),
        (
            "--modules AT/vmlinuz",
            "Wrong --modules DIR/vmlinuz: it is no directory; name the directory …/lib/modules/VERSION",
        ),
        (
            "--api-socket AT/none/vm.sock",
            "Wrong --api-socket DIR/none: No such file or directory (os error 2); make this directory first, or choose another",
        ),
        (
            "--file AT/none:/x",
            "Wrong --file DIR/none: No such file or directory (os error 2); name a file that can be read",
        ),
        ("--memory 1024T", "give less"),
        (
            "--pmem size=1G,at=0x140000000 --pmem file=AT/a.img,at=0x100000000",
            "Wrong --pmem p1: at 0x100000000: ",
        ),
    ];
    for (line, expected) in cases {
        let line = line.replace("AT", &at.to_string());
        if expected.is_empty() {
            assert!(machine(&format!("-k {at}/vmlinuz {line}")).is_err());
            continue;
        }
        if expected.ends_with(": ") {
            // These two only touch: 4 GiB to 5 GiB and 5 GiB to 6 GiB.
            assert!(check(&line).is_ok(), "{line}");
            continue;
        }
        let found = words(&line);
        assert!(found == expected || found.ends_with(&format!("; {expected}")), "{line}\n{found}");
    }
    let line = format!("--pmem size=1G,at=0x140000000 --pmem file={at}/a.img,at=0x120000000");
    assert_eq!(
        words(&line),
        "Wrong --pmem p1: at 0x120000000: it would overlap device p0 at 0x140000000 to 0x180000000; give at=0x180000000 or leave it out"
    );
    fs::hard_link(dir.path().join("vmlinuz"), dir.path().join("c.img")).unwrap();
    fs::File::options().append(true).open(dir.path().join("c.img")).unwrap().set_len(2 * MIB).unwrap();
    assert_eq!(
        words(&format!("--pmem file={at}/c.img")),
        "Wrong --pmem p0: file DIR/c.img: it is the kernel or its initial RAM disk too; give the device a file of its own"
    );
}

#[test]
fn inserted_devices_are_checked_like_others() {
    let pmem = Pmem::parse("pmem", "size=1G,id=p1,at=p0").unwrap();
    assert_eq!(pmem.at, Some(Place::Device("p0".into())));
    assert_eq!(validate_insert(&pmem, &["p0"]), Ok(vec![]));
    assert!(validate_insert(&pmem, &["p1"]).unwrap_err().to_string().contains("two devices have this id"));
    let json = serde_json::to_string(&pmem).unwrap();
    assert_eq!(json, r#"{"id":"p1","size":"1G","at":"p0"}"#);
    assert_eq!(serde_json::from_str::<Pmem>(&json).unwrap(), pmem);
}

fn any_pmem(index: usize) -> impl Strategy<Value = Pmem> {
    let channel =
        prop::option::of(prop_oneof![Just(Channel::Container), Just(Channel::Agent), Just(Channel::None)]);
    let place = prop::option::of((1u64..100).prop_map(|g| Place::Address((g << 30).into())));
    let family = prop_oneof![Just(Family::Intel), Just(Family::Microsoft), Just(Family::None)];
    let labels = prop_oneof![
        Just(Labels::Kept),
        Just(Labels::Init),
        Just(Labels::None),
        Just(Labels::File("a,b".into()))
    ];
    let flags = prop_oneof![Just(StateFlags::default()), Just("not_armed+map_fail".parse().unwrap())];
    let full_line_store = prop_oneof![Just(FullLineStore::Keep), Just(FullLineStore::Clear)];
    let ars = (0u64..5000, 1usize..=168, 6u32..=21).prop_map(|(time, records, unit)| Ars {
        time: Duration::from_millis(time),
        records,
        clear_unit: 1 << unit,
    });
    let unflushed = prop_oneof![Just(Unflushed::Keep), Just(Unflushed::Drop)];
    let dimm = (family, labels, flags, ars, full_line_store, unflushed);
    (any::<bool>(), 1u64..5000, channel, prop::option::of(0u32..9), any::<bool>(), place, dimm).prop_map(
        move |(
            file,
            size,
            channel,
            node,
            readonly,
            at,
            (family, labels, flags, ars, full_line_store, unflushed),
        )| {
            let size = Size(size * 2 * MIB);
            let source = if file {
                PmemSource::File { path: format!("/tmp/a,{index}.img").into(), size: Some(size) }
            } else {
                PmemSource::Memory(size)
            };
            let id = format!("p{index}");
            Pmem {
                source,
                channel,
                node,
                readonly,
                at,
                family,
                labels,
                flags,
                ars,
                full_line_store,
                unflushed,
                ..Pmem::memory(id, size)
            }
        },
    )
}

proptest! {
    #[test]
    fn machine_files_read_back(
        cpus in 1u32..=64,
        memory in 32u64..1 << 20,
        cpu: [bool; 5],
        vendor in prop::sample::select(vec![CpuVendor::Host, CpuVendor::Intel, CpuVendor::Amd]),
        lmce: Option<bool>,
        slots in 0u32..60,
        agent: bool,
        timeout in prop::option::of(1u64..1 << 30),
        words in prop::collection::vec("[ -~]{0,12}", 0..3),
        pmem in (any_pmem(0), any_pmem(1)),
    ) {
        let machine = Machine {
            kernel: "/boot/vmlinuz".into(),
            initrd: Some("/boot/initrd".into()),
            cmdline: words.join(" "),
            cpus,
            memory: Size(memory * 2 * MIB),
            cpu: Cpu {
                vendor,
                mca: cpu[3].then_some(MachineChecks::Legacy),
                recovery: cpu[4],
                lmce,
                erms: cpu[2],
                hypervisor: cpu[0],
                kvmclock: cpu[1],
                pm_timer: cpu[2],
            },
            slots: Slots { nfit: slots, ..Slots::default() },
            agent,
            timeout: timeout.map(|ms| TimeSpan(std::time::Duration::from_millis(ms))),
            command: words,
            files: vec![PackedFile { source: "/a".into(), target: "/b".into() }],
            pmem: vec![pmem.0, pmem.1],
            ..Machine::default()
        };
        let text = machine.to_toml().unwrap();
        prop_assert_eq!(Machine::from_toml("m", &text).unwrap(), machine);
    }

    #[test]
    fn no_text_makes_the_parsers_panic(text in "\\PC{0,80}") {
        let _ = Pmem::parse("--pmem", &text);
        let _ = Cpu::default().apply("--cpu", &text);
        let _ = Slots::default().apply("--slots", &text);
        let _ = PackedFile::parse("--file", &text);
        let _ = Machine::from_toml("m", &text);
    }

    #[test]
    fn nearly_right_texts_do_not_panic(
        text in "((file|size|id|via|channel|node|readonly|at|labels|family|flags|ars|ars_records|clear_unit|full_line_store|unflushed|type)=(1G|0x10|msft|map_fail|init|p0|on|nfit|virtio|e820|soft|drop|pcie|,,|none|18446744073709551615T|-1)?,?){0,6}"
    ) {
        if let Ok(pmem) = Pmem::parse("--pmem", &text) {
            let _ = validate_insert(&pmem, &[]);
        }
    }

    #[test]
    fn no_file_makes_the_image_check_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..700), elf: bool) {
        let magic: &[(usize, &[u8])] = if elf {
            &[(0, b"\x7fELF\x02\x01"), (18, &[62, 0])]
        } else {
            &[(0x1FE, &[0x55, 0xAA]), (0x202, b"HdrS"), (0x206, &[0x0F, 0x02]), (0x236, &[1])]
        };
        for (at, value) in magic {
            if let Some(place) = bytes.get_mut(*at..*at + value.len()) {
                place.copy_from_slice(value);
            }
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), &bytes).unwrap();
        let _ = image::inspect(file.path());
    }
}

#[test]
fn the_sample_machines_are_valid() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/machines");
    let mut seen = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let mut machine = Machine::load(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        machine.kernel = "vmlinuz".into();
        machine.complete();
        machine.validate().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        seen += 1;
    }
    assert!(seen >= 2, "the samples are there");
}
