//! Errors of processors: of any kind (UEFI 2.10, N.2.4.1) and of x86 (N.2.4.2).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Section, Validation};
use crate::Guid;

const GENERIC: Guid =
    Guid::new(0x9876_CCAD, 0x47B4, 0x4BDB, [0xB6, 0x5E, 0x16, 0xF1, 0x93, 0xC4, 0xF3, 0xDB]);
const X86: Guid = Guid::new(0xDC3E_A0B0, 0xA144, 0x4797, [0xB9, 0x5B, 0x53, 0xFA, 0x24, 0x2B, 0x6E, 0x1D]);

/// An error of a processor (UEFI 2.10, table N.16). The processor is said to be an x86 one in 64-bit mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessorError {
    /// Type of the error: bit 0 cache, 1 TLB, 2 bus, 3 micro-architectural.
    pub error_type: Option<u8>,
    /// 0 unknown, 1 data read, 2 data write, 3 instruction execution.
    pub operation: Option<u8>,
    /// Bit 0 restartable, 1 precise IP, 2 overflow, 3 corrected.
    pub flags: Option<u8>,
    /// Level of the structure.
    pub level: Option<u8>,
    /// CPUID leaf 1, EAX.
    pub version: Option<u64>,
    /// APIC ID.
    pub apic_id: Option<u64>,
    /// Address that was accessed.
    pub target: Option<u64>,
    /// Who asked.
    pub requestor: Option<u64>,
    /// Who answered.
    pub responder: Option<u64>,
    /// Instruction pointer.
    pub ip: Option<u64>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawGeneric {
    validation: U64,
    processor_type: u8,
    isa: u8,
    error_type: u8,
    operation: u8,
    flags: u8,
    level: u8,
    reserved: U16,
    version: U64,
    brand: [u8; 128],
    processor_id: U64,
    target: U64,
    requestor: U64,
    responder: U64,
    ip: U64,
}

const _: () = assert!(size_of::<RawGeneric>() == 192);

/// Processor type: IA32 and x86-64.
const TYPE_X86: u8 = 0;
/// Instruction set: x86-64.
const ISA_X86_64: u8 = 2;

impl ProcessorError {
    /// The section.
    pub fn section(&self) -> Section {
        let mut valid = Validation::default();
        let raw = RawGeneric {
            processor_type: valid.take(0, Some(TYPE_X86)),
            isa: valid.take(1, Some(ISA_X86_64)),
            error_type: valid.take(2, self.error_type),
            operation: valid.take(3, self.operation),
            flags: valid.take(4, self.flags),
            level: valid.take(5, self.level),
            reserved: U16::ZERO,
            version: valid.u64(6, self.version),
            brand: [0; 128],
            processor_id: valid.u64(8, self.apic_id),
            target: valid.u64(9, self.target),
            requestor: valid.u64(10, self.requestor),
            responder: valid.u64(11, self.responder),
            ip: valid.u64(12, self.ip),
            validation: valid.bits(),
        };
        Section { guid: GENERIC, body: raw.as_bytes().to_vec() }
    }
}

/// Registers of one bank of AMD's scalable machine-check architecture, as the context of an x86 section.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SmcaBank {
    /// Number of the bank.
    pub bank: u8,
    /// MCA_STATUS.
    pub status: u64,
    /// MCA_ADDR.
    pub address: u64,
    /// MCA_MISC0.
    pub misc: u64,
    /// MCA_CONFIG.
    pub config: u64,
    /// MCA_IPID.
    pub ipid: u64,
    /// MCA_SYND.
    pub synd: u64,
}

/// An error of an x86 processor (UEFI 2.10, table N.17), with a machine-check structure and, if known, the registers
/// of an SMCA bank. Linux logs the latter as a machine check (`apei_smca_report_x86_error`), so everybody on its
/// decoder chain hears of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct X86ProcessorError {
    /// Local APIC ID.
    pub apic_id: Option<u64>,
    /// CPUID leaf 1: EAX, EBX, ECX, EDX.
    pub cpuid: Option<[u32; 4]>,
    /// Address that was accessed; makes an error structure of type "cache check".
    pub target: Option<u64>,
    /// Instruction pointer, part of the error structure.
    pub ip: Option<u64>,
    /// The bank.
    pub bank: Option<SmcaBank>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawX86 {
    validation: U64,
    apic_id: U64,
    cpuid: [U64; 6],
}

const _: () = assert!(size_of::<RawX86>() == 64);

/// Processor error information structure (table N.18).
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawInformation {
    kind: [u8; 16],
    validation: U64,
    check: U64,
    target: U64,
    requestor: U64,
    responder: U64,
    ip: U64,
}

const _: () = assert!(size_of::<RawInformation>() == 64);

/// Processor context structure (table N.25) with the registers of a bank.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawContext {
    kind: U16,
    array_size: U16,
    msr: U32,
    mm_register: U64,
    registers: [U64; 6],
}

const _: () = assert!(size_of::<RawContext>() == 64);

const CACHE_CHECK: Guid =
    Guid::new(0xA557_01F5, 0xE3EF, 0x43DE, [0xAC, 0x72, 0x24, 0x9B, 0x57, 0x3F, 0xAD, 0x2C]);
/// Context type: MSR registers.
const CONTEXT_MSR: u16 = 1;
/// MCA_STATUS of bank 0 (Linux `MSR_AMD64_SMCA_MC0_STATUS`), and the distance to the next bank.
const SMCA_STATUS: u32 = 0xC000_2001;
const SMCA_BANK: u32 = 0x10;
const INFORMATION_COUNT_SHIFT: u32 = 2;
const CONTEXT_COUNT_SHIFT: u32 = 8;

impl X86ProcessorError {
    /// The section.
    pub fn section(&self) -> Section {
        let mut valid = Validation::default();
        let apic_id = valid.u64(0, self.apic_id);
        let cpuid = valid.take(1, self.cpuid);
        let information = (self.target.is_some() || self.ip.is_some()).then(|| self.information());
        let mut bits = valid.0;
        bits |= u64::from(information.is_some()) << INFORMATION_COUNT_SHIFT;
        bits |= u64::from(self.bank.is_some()) << CONTEXT_COUNT_SHIFT;
        let pair = |low: u32, high: u32| U64::new(u64::from(high) << 32 | u64::from(low));
        let head = RawX86 {
            validation: U64::new(bits),
            apic_id,
            cpuid: [
                pair(cpuid[0], cpuid[1]),
                pair(cpuid[2], cpuid[3]),
                U64::ZERO,
                U64::ZERO,
                U64::ZERO,
                U64::ZERO,
            ],
        };
        let mut body = head.as_bytes().to_vec();
        body.extend(information.iter().flat_map(|information| information.as_bytes()));
        body.extend(self.bank.iter().flat_map(|bank| bank.context().as_bytes().to_vec()));
        Section { guid: X86, body }
    }

    fn information(&self) -> RawInformation {
        let mut valid = Validation::default();
        RawInformation {
            kind: CACHE_CHECK.bytes(),
            check: U64::ZERO,
            target: valid.u64(1, self.target),
            requestor: U64::ZERO,
            responder: U64::ZERO,
            ip: valid.u64(4, self.ip),
            validation: valid.bits(),
        }
    }
}

impl SmcaBank {
    /// The registers in the order in which Linux expects them (`apei_smca_report_x86_error` in
    /// arch/x86/kernel/cpu/mce/apei.c).
    fn context(&self) -> RawContext {
        let registers = [self.status, self.address, self.misc, self.config, self.ipid, self.synd];
        RawContext {
            kind: U16::new(CONTEXT_MSR),
            array_size: U16::new(size_of_val(&registers) as u16),
            msr: U32::new(SMCA_STATUS + SMCA_BANK * u32::from(self.bank)),
            mm_register: U64::ZERO,
            registers: registers.map(U64::new),
        }
    }
}
