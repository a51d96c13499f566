//! The memory of a bare guest before its first instruction.

use crate::layout::*;
use anyhow::{Context, Result, ensure};
use iced_x86::code_asm::*;
use std::ops::Range;

/// How operands are mapped, and what the guest's code may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// 0 or 3: where the guest starts.
    pub cpl: u8,
    /// Code, stack and operands are user pages.
    pub user: bool,
    /// Size of the page that maps operands.
    pub page: PageSize,
    /// Five levels of page tables.
    pub five_levels: bool,
    /// Operands are user pages though the code is the supervisor's: CR4.SMAP, with EFLAGS.AC set.
    pub smap: bool,
    /// The program is 32-bit code in compatibility mode; it, its stack and operands are at their own addresses.
    pub compatibility: bool,
    /// CR4.PCIDE.
    pub pcid: bool,
}

/// The sizes of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB.
    Large,
    /// 1 GiB.
    Huge,
}

impl Mode {
    /// Supervisor code with small pages.
    pub const KERNEL: Self = Self {
        cpl: 0,
        user: false,
        page: PageSize::Small,
        five_levels: false,
        smap: false,
        compatibility: false,
        pcid: false,
    };
    /// User code with small pages.
    pub const USER: Self = Self { cpl: 3, user: true, ..Self::KERNEL };
    /// Supervisor code in user pages, on its way to user code.
    pub const ENTERING: Self = Self { cpl: 0, ..Self::USER };
    /// 32-bit user code.
    pub const COMPATIBILITY: Self = Self { compatibility: true, ..Self::USER };
}

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
/// Set from the start: what a processor marks on its way to a handler is not what a row is about.
const MARKED: u64 = 0x60;
const LARGE: u64 = 0x80;

/// The bytes of both regions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// From [`LOW`] on.
    pub low: Vec<u8>,
    /// From [`DATA`] on.
    pub data: Vec<u8>,
}

impl Image {
    /// Tables, handlers and start values; no code yet. The handler of machine checks reads and clears the bank whose
    /// status, address and MCG_STATUS registers are `bank`.
    pub fn new(mode: Mode, bank: [u32; 3]) -> Result<Self> {
        let mut image = Self { low: vec![0; LOW_LEN as usize], data: vec![0; DATA_LEN as usize] };
        for (at, byte) in image.data.iter_mut().enumerate() {
            *byte = (at as u32).wrapping_mul(0x9e37_79b9).to_be_bytes()[0] | 1;
        }
        image.paging(mode);
        image.segments();
        image.handlers(bank)?;
        image.vectors();
        Ok(image)
    }

    /// The bytes at a guest-physical range, if they are all in one region.
    pub fn bytes(&self, range: Range<u64>) -> Option<&[u8]> {
        let (bytes, base) = if range.start >= DATA { (&self.data, DATA) } else { (&self.low, LOW) };
        bytes.get((range.start - base) as usize..range.end.checked_sub(base)? as usize)
    }

    /// Writes at a guest-physical address.
    pub fn write(&mut self, gpa: u64, bytes: &[u8]) {
        let (to, base) = if gpa >= DATA { (&mut self.data, DATA) } else { (&mut self.low, LOW) };
        let at = (gpa - base) as usize;
        to[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Writes a 64-bit word.
    pub fn word(&mut self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    fn paging(&mut self, mode: Mode) {
        let table = PRESENT | WRITABLE | USER | MARKED & 0x20;
        let user = if mode.user { USER } else { 0 };
        let trees = [(0, 0, LOW_TABLES), (8, 0, CODE_TABLES), (16, 16, DATA_TABLES), (24, 3, DEVICE_TABLES)];
        for (top, pointer, [pointers, directory, _]) in trees {
            self.word(PML4 + 8 * top, pointers | table);
            self.word(pointers + 8 * pointer, directory | table);
        }
        self.word(PML5, PML4 | table);
        self.word(LOW_TABLES[1], LOW_TABLES[2] | table);
        self.word(CODE_TABLES[1], CODE_TABLES[2] | table);
        let leaf = PRESENT | WRITABLE | MARKED;
        let own = if mode.compatibility { user } else { 0 };
        if mode.compatibility {
            self.word(LOW_TABLES[1] + 8 * (DATA >> 21), DATA_TABLES[2] | table);
        }
        for page in (0..LOW_LEN).step_by(4096) {
            self.word(LOW_TABLES[2] + page / 512, page | leaf | own);
            self.word(CODE_TABLES[2] + page / 512, page | leaf | user);
        }
        let shared = if mode.smap { USER } else { user };
        match mode.page {
            PageSize::Small => {
                self.word(DATA_TABLES[1] + 8 * (DATA >> 21), DATA_TABLES[2] | table);
                for page in (DATA..DATA + DATA_LEN).step_by(4096) {
                    self.word(DATA_TABLES[2] + 8 * (page >> 12 & 511), page | leaf | shared);
                }
            }
            PageSize::Large => {
                let frame = DATA & !0x1f_ffff;
                self.word(DATA_TABLES[1] + 8 * (DATA >> 21), frame | leaf | shared | LARGE);
            }
            PageSize::Huge => self.word(DATA_TABLES[0] + 8 * 16, leaf | shared | LARGE),
        }
        let directory = DEVICE >> 21 & 511;
        self.word(DEVICE_TABLES[1] + 8 * directory, DEVICE_TABLES[2] | table);
        self.word(DEVICE_TABLES[2], DEVICE | leaf | user);
    }

    fn segments(&mut self) {
        for (selector, descriptor) in [
            (KERNEL_CS, 0x00af_9b00_0000_ffff),
            (KERNEL_SS, 0x00cf_9300_0000_ffff),
            (USER_SS, 0x00cf_f300_0000_ffff),
            (USER_CS, 0x00af_fb00_0000_ffff),
            (OTHER_DATA, 0x00cf_9300_0000_ffff),
            (OTHER_CODE, 0x00af_9b00_0000_ffff),
            (COMPATIBILITY_CS, 0x00cf_fb00_0000_ffff),
        ] {
            self.word(GDT + u64::from(selector & !7), descriptor);
        }
        for (selector, base, kind) in [(TASK, TSS, 0x8b), (OTHER_TASK, SPARE_TSS, 0x89)] {
            let limit = u64::from(TSS_LEN - 1);
            let low = limit | (base & 0xff_ffff) << 16 | kind << 40 | (base >> 24 & 0xff) << 56;
            self.word(GDT + u64::from(selector), low);
            self.word(GDT + u64::from(selector) + 8, base >> 32);
        }
        self.word(TSS + 4, KERNEL_STACK + 0x1000);
        self.word(TSS + 0x24, MC_STACK + 0x1000);
        self.word(TSS + 0x2c, SPARE_STACK + 0x1000);
    }

    /// Every handler first says that it was reached, with all registers as they were.
    fn handlers(&mut self, [status, address, mcg_status]: [u32; 3]) -> Result<()> {
        let mut at = STUBS;
        let vectors = (0..32u8).chain(EXTRA_VECTORS);
        for (port, vector) in (PORT_VECTOR..).zip(vectors) {
            let mut code = CodeAssembler::new(64)?;
            code.out(u32::from(port), al)?;
            if vector == 18 {
                code.push(rax)?;
                code.push(rcx)?;
                code.push(rdx)?;
                for (slot, msr) in (0u64..).zip([mcg_status, status, address]) {
                    code.mov(ecx, msr)?;
                    code.rdmsr()?;
                    code.mov(dword_ptr(RECORD + 8 * slot), eax)?;
                    code.mov(dword_ptr(RECORD + 8 * slot + 4), edx)?;
                }
                code.xor(eax, eax)?;
                code.xor(edx, edx)?;
                for msr in [status, mcg_status] {
                    code.mov(ecx, msr)?;
                    code.wrmsr()?;
                }
                code.pop(rdx)?;
                code.pop(rcx)?;
                code.pop(rax)?;
                code.out(u32::from(PORT_HANDLED), al)?;
            }
            if has_error_code(vector) {
                code.add(rsp, 8)?;
            }
            code.iretq()?;
            let bytes = code.assemble(at).context("A handler cannot be assembled")?;
            ensure!(
                bytes.len() as u64 <= if vector == 18 { 4 * STUB } else { STUB },
                "A handler is too long"
            );
            self.write(at, &bytes);
            self.write(IDT + 16 * u64::from(vector), &gate(at, u8::from(vector == 18)));
            at += if vector == 18 { 4 * STUB } else { STUB };
        }
        let mut code = CodeAssembler::new(64)?;
        code.mov(rax, cr3)?;
        code.mov(cr3, rax)?;
        code.mov(eax, -1i32)?;
        code.mov(edx, -1i32)?;
        code.mov(edi, XSAVE as u32)?;
        code.xrstor(ptr(rdi))?;
        code.out(u32::from(PORT_READY), al)?;
        let bytes = code.assemble(START).context("The start cannot be assembled")?;
        self.write(START, &bytes);
        Ok(())
    }

    /// x87 with two values on its stack, and vector registers full of bytes that differ.
    fn vectors(&mut self) {
        let mut area = vec![0u8; 4096];
        area[0..2].copy_from_slice(&0x037fu16.to_le_bytes());
        // Top of stack 6: ST0 and ST1 are physical registers 6 and 7.
        area[2..4].copy_from_slice(&(6u16 << 11).to_le_bytes());
        area[4] = 0xc0;
        area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        // 1.5 and 12345.0 as extended reals.
        area[32..42].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0xc0, 0xff, 0x3f]);
        area[48..58].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0xe4, 0xc0, 0x0c, 0x40]);
        for (at, byte) in area[160..416].iter_mut().enumerate() {
            *byte = (at as u8).wrapping_mul(37) ^ 0x5a;
        }
        for (at, byte) in area[576..832].iter_mut().enumerate() {
            *byte = (at as u8).wrapping_mul(59) ^ 0xa5;
        }
        area[512] = 7;
        self.write(XSAVE, &area);
    }
}

/// A gate to `handler`, on stack table entry `ist`, for callers of all levels.
pub fn gate(handler: u64, ist: u8) -> [u8; 16] {
    let low = handler & 0xffff
        | u64::from(KERNEL_CS) << 16
        | u64::from(ist & 7) << 32
        | 0xee << 40
        | (handler >> 16 & 0xffff) << 48;
    (u128::from(low) | u128::from(handler >> 32) << 64).to_le_bytes()
}

/// Bytes of a handler. That of machine checks has four times as many.
pub const STUB: u64 = 32;

/// Limit of the interrupt descriptor table.
pub const IDT_LIMIT: u16 = 0xfff;

/// Where a guest starts: it loads the start values of vector registers, and drops old translations.
pub const START: u64 = STUBS + 0xf00;

/// Whether the processor pushes an error code (SDM volume 3, table 6-1).
pub fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
}
