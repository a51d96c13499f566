//! Each special case of its own.

use kvm_bindings::kvm_segment;
use proptest::prelude::*;

use super::harness::{CODE, Memory, guest, hex};
use super::*;

/// The accesses after the fetch, one word for each.
pub(super) fn shown(operands: &Operands) -> String {
    let word = |access: &Access| {
        let letter = match access.kind {
            AccessKind::Walk => 'W',
            AccessKind::Fetch => 'X',
            AccessKind::Load => 'L',
            AccessKind::ReadModifyWrite => 'M',
            AccessKind::CacheControl => 'C',
            AccessKind::Prefetch => 'P',
            AccessKind::Store => 'S',
            AccessKind::FullLineStore => 'F',
            AccessKind::Probe => 'B',
        };
        format!("{letter}{:x}+{}", access.address, access.size)
    };
    operands.accesses[1..].iter().map(word).collect::<Vec<_>>().join(" ")
}

pub(super) fn list(
    code: &str,
    adjust: impl FnOnce(&mut CpuState, &mut Memory),
) -> Result<Operands, Unresolved> {
    let (mut state, mut memory) = guest(&hex(code));
    adjust(&mut state, &mut memory);
    operands(&state, &memory)
}

pub(super) fn touches(code: &str, adjust: impl FnOnce(&mut CpuState, &mut Memory)) -> String {
    shown(&list(code, adjust).unwrap())
}

#[test]
fn xsave_areas_follow_the_masks_and_the_layout() {
    let all = |state: &mut CpuState| (state.regs.rax, state.regs.rdx) = (u64::MAX, u64::MAX);
    let legacy = "11000+24 S11018+8 S11020+128 S110a0+256";
    let row = |code: &str| touches(code, |state, _| all(state));
    assert_eq!(row("0fae23"), format!("M11200+8 B11000+576 S{legacy} S11240+256"), "xsave [rbx]");
    assert_eq!(row("0fae33"), format!("M11200+8 B11000+576 S{legacy} S11240+256"), "xsaveopt [rbx]");
    assert_eq!(row("0fc723"), format!("B11000+576 S{legacy} S11200+16 S11240+256"), "xsavec [rbx]");
    assert_eq!(
        row("0fc72b"),
        format!("B11000+576 S{legacy} S11200+16 S11240+256 S11340+16"),
        "xsaves [rbx] with XSS bit 11"
    );
    assert_eq!(touches("0fae23", |state, _| state.regs.rax = 0), "M11200+8 B11000+576", "nothing requested");
    let sse = |state: &mut CpuState, _: &mut Memory| (state.regs.rax, state.regs.rdx) = (2, 0);
    assert_eq!(touches("0fae23", sse), "M11200+8 B11000+576 S11018+8 S110a0+256");
    assert_eq!(
        list("0fae23", |state, _| state.extended = None).unwrap_err().reason,
        Reason::NeedsExtendedState
    );
}

#[test]
fn xrstor_reads_what_the_header_says_is_present() {
    let all = |state: &mut CpuState| (state.regs.rax, state.regs.rdx) = (u64::MAX, u64::MAX);
    let row = |code: &str, present: u64, format: u64| {
        touches(code, |state, memory| {
            all(state);
            memory.put(0x6_0200, &present.to_le_bytes());
            memory.put(0x6_0208, &format.to_le_bytes());
        })
    };
    assert_eq!(
        row("410fae2f", 4, 0),
        "C60000+576 L60200+64 L60018+8 L60240+256",
        "xrstor [r15]: MXCSR goes with AVX"
    );
    assert_eq!(row("410fae2f", 1, 0), "C60000+576 L60200+64 L60000+24 L60018+8 L60020+128");
    assert_eq!(row("410fae2f", 2, 1 << 63 | 6), "C60000+576 L60200+64 L60018+8 L600a0+256", "compacted");
    let shadow = 1 << 11;
    assert_eq!(row("410fc71f", shadow, 1 << 63 | shadow), "C60000+576 L60200+64 L60240+16", "xrstors [r15]");
    assert_eq!(row("410fc71f", 4, 0), "C60000+576 L60200+64", "xrstors refuses the standard format");
}

#[test]
fn repeated_strings_report_one_element_and_what_is_left() {
    let rep = list("f3a4", |state, _| state.regs.rcx = 0x1000).unwrap();
    assert_eq!(
        rep.repeat,
        Some(Repeat {
            operation: StringOperation::Move,
            count: 0x1000,
            element: 1,
            backwards: false,
            address_size: 8,
            source: Some(0x3_0000),
            destination: Some(0x4_0000),
        })
    );
    let none = list("f348a5", |state, _| (state.regs.rcx, state.regs.rflags) = (0, 0x402)).unwrap();
    assert_eq!(shown(&none), "", "with a count of zero nothing is touched");
    assert!(none.repeat.is_some_and(|repeat| repeat.backwards && repeat.element == 8));
    let narrow = list("67f3a4", |state, _| state.regs.rcx = 0xff_0000_0003).unwrap();
    assert_eq!(narrow.repeat.map(|repeat| (repeat.count, repeat.address_size)), Some((3, 4)));
    assert_eq!(list("a4", |_, _| {}).unwrap().repeat, None);
    assert_eq!(list("f30f1000", |_, _| {}).unwrap().repeat, None, "movss has the prefix and is no string");
}

#[test]
fn stores_of_a_whole_line_need_the_whole_line() {
    assert_eq!(touches("0f01fc", |state, _| state.regs.rax = 0x1_003f), "F10000+64", "clzero aligns down");
    assert_eq!(touches("670f01fc", |state, _| state.regs.rax = 0xf_0001_0000), "F10000+64", "by EAX");
}

#[test]
fn a_call_gate_adds_the_code_segment_behind_it() {
    let gate = |_: &mut CpuState, memory: &mut Memory| memory.put(0x9_0010, &hex("0000300000ec0000"));
    assert_eq!(touches("41ff6afc", gate), "L52ffc+6 L90010+16 L90030+8");
}

#[test]
fn null_selectors_and_the_ldt() {
    assert_eq!(touches("8ed8", |state, _| state.regs.rax = 3), "", "mov ds, eax: null");
    let local =
        |state: &mut CpuState, _: &mut Memory| (state.regs.rax, state.sregs.ldt.base) = (0x17, 0x9_3000);
    assert_eq!(touches("8ed8", local), "L93010+8");
}

#[test]
fn segments_count_outside_64_bit_mode() {
    let protected = |state: &mut CpuState, memory: &mut Memory| {
        state.sregs.efer = 0;
        state.sregs.cr0 = 1;
        state.sregs.cs = kvm_segment { db: 1, base: 0x1000, ..Default::default() };
        state.sregs.ds.base = 0xffff_f000;
        state.sregs.ss.base = 0x100;
        state.regs.rip = CODE - 0x1000;
        state.regs.rbx = 0x2000;
        memory.put(CODE, &hex("8b03"));
    };
    assert_eq!(touches("8b03", protected), "L1000+4", "mov eax, [ebx] wraps at 4 GiB");
    assert_eq!(
        touches("50", |state, memory| {
            protected(state, memory);
            memory.put(CODE, &[0x50, 0]);
        }),
        "S200fc+4",
        "push eax"
    );
    let real = |state: &mut CpuState, _: &mut Memory| {
        state.sregs.efer = 0;
        state.sregs.cr0 = 0;
        state.sregs.cs = kvm_segment { base: 0xf_0000, ..Default::default() };
        state.sregs.ds.base = 0x2_0000;
        (state.regs.rip, state.regs.rbx, state.regs.rsi) = (0, 0xfff0, 0x20);
    };
    let at_zero = |state: &mut CpuState, memory: &mut Memory| {
        real(state, memory);
        memory.put(0xf_0000, &hex("8a00"));
    };
    assert_eq!(touches("", at_zero), "L20010+1", "mov al, [bx+si] wraps within the segment");
}

#[test]
fn the_instruction_may_run_into_a_page_that_is_missing() {
    let split = |second: u64| {
        move |state: &mut CpuState, memory: &mut Memory| {
            // 4 KiB pages for the code at the end of page 0x100 and in page 0x101.
            memory.put(0x2000, &0x3007u64.to_le_bytes());
            memory.put(0x3000, &0x4007u64.to_le_bytes());
            memory.put(0x4000 + 8 * 0x100, &0x10_0007u64.to_le_bytes());
            memory.put(0x4000 + 8 * 0x101, &second.to_le_bytes());
            memory.put(0x10_0ffe, &hex("488b"));
            memory.put(0x20_0000, &[0x02]);
            state.regs.rip = 0x10_0ffe;
        }
    };
    assert_eq!(touches("", split(0x20_0007)), "L12000+8", "mov rax, [rdx] across two frames");
    let missing = list("", split(0)).unwrap_err();
    let why = crate::x86::walk::NotTranslated::NotPresent { level: 1 };
    assert_eq!(missing.reason, Reason::FetchNotTranslated { linear: 0x10_1000, why });
    assert_eq!(missing.accesses[0].size, 2);
    let forbidden = list("", split(0x20_0007 | 1 << 63)).unwrap_err();
    assert_eq!(forbidden.reason, Reason::FetchForbidden { linear: 0x10_1000 });
    let absent = list("", split(0xff_0000_0007)).unwrap_err();
    assert_eq!(absent.reason, Reason::NoCode { gpa: 0xff_0000_0000 });
    let short = list("", |state, memory| {
        split(0)(state, memory);
        memory.put(0x10_0ffe, &[0x90]);
    });
    assert!(short.is_ok(), "an instruction that ends in time does not need the next page");
}

#[test]
fn bytes_that_are_no_instruction_are_named() {
    assert_eq!(list("06", |_, _| {}).unwrap_err().reason, Reason::Undecodable, "push es in 64-bit mode");
    let prefixes = list(&"66".repeat(20), |_, _| {}).unwrap_err();
    assert_eq!(prefixes.reason, Reason::Undecodable);
    assert_eq!(prefixes.bytes.as_slice().len(), 15);
    assert_eq!(list("0f01d8", |_, _| {}).unwrap_err().reason, Reason::NotModelled, "vmrun");
}

#[test]
fn hazards() {
    use StepHazard::*;
    for (code, hazard) in [
        ("90", None),
        ("9c", PushesFlags),
        ("9d", PopsFlags),
        ("48cf", ReturnsFromInterrupt),
        ("0f05", SystemCall),
        ("480f07", ReturnsFromSystemCall),
        ("0f34", SystemEnter),
        ("cd80", SoftwareInterrupt),
        ("cc", SoftwareInterrupt),
        ("f1", SoftwareInterrupt),
        ("8ed0", HoldsTrapBack),
        ("fb", HoldsTrapBack),
        ("8ed8", None),
        ("f4", Halts),
        ("ec", LeavesToMonitor),
        ("f36e", LeavesToMonitor),
        ("0f30", LeavesToMonitor),
        ("c7f800000000", Transaction),
    ] {
        assert_eq!(list(code, |_, _| {}).unwrap().hazard, hazard, "{code}");
    }
}

#[test]
fn deliveries_switch_stacks_as_the_tables_say() {
    let (mut state, mut memory) = guest(&[]);
    memory.put(0x9_1000 + 16 * 14, &hex("0000300000ee0000"));
    memory.put(0x9_2004, &0x7_0008u64.to_le_bytes());
    let shown = |state: &CpuState, memory: &Memory| {
        let event = Delivery { vector: 14, error_code: true };
        delivery_accesses(state, memory, event)
            .iter()
            .map(|access| (access.address, access.size))
            .collect::<Vec<_>>()
    };
    let kernel = shown(&state, &memory);
    assert_eq!(kernel, [(0x9_10e0, 16), (0x9_0030, 8), (0x1_ffd0, 48)]);
    state.sregs.ss.dpl = 3;
    let user = shown(&state, &memory);
    assert_eq!(user, [(0x9_10e0, 16), (0x9_0030, 8), (0x9_2004, 8), (0x6_ffd0, 48)]);
    memory.put(0x9_10e4, &[7]);
    memory.put(0x9_2054, &0x8_0000u64.to_le_bytes());
    assert_eq!(shown(&state, &memory)[2..], [(0x9_2054, 8), (0x7_ffd0, 48)]);
    memory.put(0x9_10e5, &[0]);
    assert_eq!(shown(&state, &memory).len(), 1, "no gate, no frame");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16 * ProptestConfig::default().cases, ..ProptestConfig::default() })]
    #[test]
    fn no_bytes_and_no_registers_make_it_panic(
        code in prop::collection::vec(any::<u8>(), 15),
        registers in prop::array::uniform16(any::<u64>()),
        mode in 0..4u8,
        supplied in any::<bool>(),
    ) {
        let (mut state, memory) = guest(&code);
        if !supplied {
            state.extended = Option::None;
        }
        match mode {
            0 => {}
            1 => (state.sregs.efer, state.sregs.cr0, state.sregs.cs.db) = (0, 1, 1),
            2 => (state.sregs.efer, state.sregs.cr0) = (0, 0),
            _ => (state.sregs.cs.l, state.sregs.cs.db) = (0, 1),
        }
        let r = registers;
        let regs = &mut state.regs;
        (regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp) = (r[0], r[1], r[2], r[3], r[4], r[5]);
        (regs.rsi, regs.rdi, regs.r8, regs.r9, regs.r10, regs.r11) = (r[6], r[7], r[8], r[9], r[10], r[11]);
        (regs.r12, regs.r13, regs.r14, regs.r15) = (r[12], r[13], r[14], r[15]);
        if let Ok(found) = operands(&state, &memory) {
            prop_assert!(!found.text().is_empty());
            prop_assert!(found.accesses.iter().all(|access| access.size > 0));
            crate::x86::physical::physical_accesses(&state, &memory, &found.accesses);
        }
    }
}

#[test]
fn what_is_not_modelled_is_known() {
    // VIA's encryption, virtual machines, lists of MSRs and platform binding of keys: none of them is offered to the guest.
    const KNOWN: [&str; 18] = [
        "Ccs_encrypt",
        "Ccs_hash",
        "Skinit",
        "Vmlaunch",
        "Vmload",
        "Vmresume",
        "Vmrun",
        "Vmsave",
        "Xcryptcbc",
        "Xcryptcfb",
        "Xcryptctr",
        "Xcryptecb",
        "Xcryptofb",
        "Xsha",
        "Xstore",
        "Rdmsrlist",
        "Pbndkb",
        "Wrmsrlist",
    ];
    const STARTS: [&[u8]; 12] = [
        &[],
        &[0x0f],
        &[0x62],
        &[0xc4],
        &[0xc5],
        &[0x0f, 0x38],
        &[0x0f, 0x3a],
        &[0x66, 0x0f],
        &[0xf3, 0x0f],
        &[0xf2, 0x0f],
        &[0xf0],
        &[0x0f, 0x01],
    ];
    let mut seed = 0x1234_5678_9abc_def1u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let (state, memory) = guest(&[]);
    let mut memory = memory;
    for round in 0..60_000 {
        let mut code = STARTS[round % STARTS.len()].to_vec();
        code.extend((0..2).flat_map(|_| next().to_le_bytes()));
        code.truncate(15);
        memory.put(CODE, &code);
        let Err(error) = operands(&state, &memory) else { continue };
        let instruction = Decoder::with_ip(64, &code, CODE, DecoderOptions::NONE).decode();
        let name = format!("{:?}", instruction.mnemonic());
        assert!(
            error.reason == Reason::Undecodable || KNOWN.iter().any(|known| name.starts_with(known)),
            "{name}: {error:?}"
        );
    }
}
