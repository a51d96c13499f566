//! Loading a Linux kernel and the state in which the first vCPU starts it.
//!
//! A bzImage is entered by the 64-bit boot protocol (Documentation/arch/x86/boot.rst), a vmlinux by PVH
//! (xen/include/public/arch-x86/hvm/start_info.h) where it has the note, and by the 64-bit protocol where
//! it has not.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use aconite_acpi::layout;
use aconite_devices::reset_control::{RESET_VECTOR, RESET_VECTOR_CODE};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, load_cmdline};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// E820 types (Advanced Configuration and Power Interface Specification 6.5, section 15).
pub const E820_RAM: u32 = 1;
/// Not to be used.
pub const E820_RESERVED: u32 = 2;
/// ACPI tables.
pub const E820_ACPI: u32 = 3;
/// Memory that firmware uses at run time.
pub const E820_NVS: u32 = 4;

/// Persistent memory.
pub const E820_PMEM: u32 = 7;
/// Persistent memory, as firmware has told of it before there was a type for it (`E820_TYPE_PRAM` in
/// arch/x86/include/asm/e820/types.h).
pub const E820_PRAM: u32 = 12;
/// Memory that is set aside for special purposes (`E820_TYPE_SOFT_RESERVED`, ibidem).
pub const E820_SOFT_RESERVED: u32 = 0xefff_ffff;

/// Longest kernel command line, with its final zero (COMMAND_LINE_SIZE of x86).
pub const COMMAND_LINE_MAX: usize = 2048;

const BZIMAGE_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
const LOADER_TYPE_UNDEFINED: u8 = 0xff;
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
const START_INFO: u64 = layout::BOOT_PARAMS;
const MODULE_LIST: u64 = START_INFO + 0x100;
const MEMORY_MAP: u64 = START_INFO + 0x200;
const START_INFO_MAGIC: u32 = 0x336e_c578;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;

/// Why a kernel cannot be started.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file cannot be opened or read.
    #[error("Cannot read {what} {path}")]
    Read {
        /// What the file is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The kernel is in no known format.
    #[error("{path} is neither a bzImage nor a 64-bit vmlinux; give an x86-64 Linux kernel")]
    Format {
        /// The file.
        path: PathBuf,
    },
    /// The kernel's headers are wrong, or it has no room.
    #[error("Cannot load kernel {path}: {reason}")]
    Load {
        /// The file.
        path: PathBuf,
        /// What the loader said.
        reason: String,
    },
    /// The command line is too long or not ASCII.
    #[error("The kernel command line cannot be used: {reason} (at most {COMMAND_LINE_MAX} bytes)")]
    CommandLine {
        /// What is wrong.
        reason: String,
    },
    /// Kernel and initial RAM disk do not fit into memory.
    #[error(
        "Kernel and initial RAM disk need {needed:#x} bytes below 3 GiB and the machine has {available:#x}; give it more --memory"
    )]
    NoRoom {
        /// Bytes needed.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// Guest memory refused a write.
    #[error("Cannot write the start state into guest memory")]
    Memory(#[source] vm_memory::GuestMemoryError),
}

/// What is started.
#[derive(Debug)]
pub struct Image<'a> {
    /// The kernel: bzImage or vmlinux.
    pub kernel: &'a Path,
    /// The initial RAM disk.
    pub initrd: &'a [u8],
    /// The kernel command line.
    pub command_line: &'a str,
    /// Ranges of the E820 map beside RAM and firmware's own, with their types.
    pub more_memory: &'a [(Range<u64>, u32)],
}

/// How the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit protocol: long mode, paging, RSI at the zero page.
    Long {
        /// First instruction.
        rip: u64,
    },
    /// PVH: 32-bit protected mode, RBX at the start info.
    Pvh {
        /// First instruction.
        rip: u64,
    },
}

/// The E820 map of a machine with these RAM ranges, and `more` ranges.
pub fn e820(ram: &[Range<u64>], more: &[(Range<u64>, u32)]) -> Vec<(Range<u64>, u32)> {
    let reserved = [
        (layout::RSDP_BASE..layout::TABLES_BASE, E820_RESERVED),
        (layout::TABLES_BASE..layout::MAILBOX_BASE, E820_ACPI),
        (layout::MAILBOX_BASE..layout::EINJ_BASE, E820_NVS),
        (layout::EINJ_BASE..layout::ACPI_END, E820_RESERVED),
    ];
    let mut map = Vec::new();
    for range in ram {
        let mut start = range.start;
        for (hole, kind) in reserved.iter().filter(|(hole, _)| range.contains(&hole.start)) {
            // The legacy video and option ROM area below 1 MiB is never RAM on a PC.
            let end = if hole.start == layout::RSDP_BASE { 0xa_0000 } else { hole.start };
            if start < end {
                map.push((start..end, E820_RAM));
            }
            map.push((hole.clone(), *kind));
            start = hole.end;
        }
        map.push((start..range.end, E820_RAM));
    }
    map.push((layout::ECAM_BASE..layout::ECAM_BASE + layout::ECAM_SIZE, E820_RESERVED));
    map.extend_from_slice(more);
    map.sort_by_key(|(range, _)| range.start);
    map
}

/// Writes kernel, initial RAM disk, command line and boot information into `memory`.
///
/// `ram` is the guest's RAM; its first range starts at 0. The ACPI tables are already there.
pub fn load(memory: &GuestMemoryMmap, ram: &[Range<u64>], image: &Image<'_>) -> Result<Entry, BootError> {
    let path = image.kernel;
    let read = |source| BootError::Read { what: "kernel", path: path.to_owned(), source };
    let mut file = File::open(path).map_err(read)?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic).map_err(read)?;
    file.seek(SeekFrom::Start(0)).map_err(read)?;
    let failed = |error: linux_loader::loader::Error| BootError::Load {
        path: path.to_owned(),
        reason: error.to_string(),
    };
    let mut line =
        Cmdline::new(COMMAND_LINE_MAX).map_err(|e| BootError::CommandLine { reason: e.to_string() })?;
    line.insert_str(image.command_line).map_err(|e| BootError::CommandLine { reason: e.to_string() })?;
    load_cmdline(memory, GuestAddress(layout::COMMAND_LINE), &line).map_err(failed)?;

    if &magic == b"\x7fELF" {
        let loaded =
            Elf::load(memory, None, &mut file, Some(GuestAddress(layout::TABLES_BASE))).map_err(failed)?;
        let initrd = place_initrd(memory, ram, image.initrd, loaded.kernel_end, u64::from(u32::MAX))?;
        return match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) => {
                write_start_info(memory, ram, initrd, image)?;
                Ok(Entry::Pvh { rip: entry.0 })
            }
            _ => {
                let header =
                    setup_header { boot_flag: BOOT_FLAG, header: BZIMAGE_MAGIC, ..Default::default() };
                write_zero_page(memory, ram, header, initrd, image)?;
                Ok(Entry::Long { rip: loaded.kernel_load.0 })
            }
        };
    }

    let load_at = Some(GuestAddress(layout::KERNEL_MIN));
    let loaded = BzImage::load(memory, load_at, &mut file, Some(GuestAddress(layout::TABLES_BASE)))
        .map_err(|_| BootError::Format { path: path.to_owned() })?;
    let header = loaded
        .setup_header
        .filter(|h| h.version >= 0x20c && h.xloadflags & XLF_KERNEL_64 != 0)
        .ok_or_else(|| BootError::Format { path: path.to_owned() })?;
    let end = loaded.kernel_end.max(layout::KERNEL_MIN + u64::from(header.init_size));
    let initrd = place_initrd(memory, ram, image.initrd, end, u64::from(header.initrd_addr_max))?;
    write_zero_page(memory, ram, header, initrd, image)?;
    Ok(Entry::Long { rip: layout::KERNEL_MIN + ENTRY_64 })
}

/// Copies the initial RAM disk to the top of low RAM, above `kernel_end`, and returns where it is.
fn place_initrd(
    memory: &GuestMemoryMmap,
    ram: &[Range<u64>],
    initrd: &[u8],
    kernel_end: u64,
    highest: u64,
) -> Result<Range<u64>, BootError> {
    let low_end = ram.first().map_or(0, |r| r.end);
    let len = initrd.len() as u64;
    let top = low_end.min(highest.saturating_add(1));
    let start = top.saturating_sub(len) & !0xfff;
    if start < kernel_end {
        return Err(BootError::NoRoom { needed: kernel_end + len, available: low_end });
    }
    memory.write_slice(initrd, GuestAddress(start)).map_err(BootError::Memory)?;
    Ok(start..start + len)
}

fn write_zero_page(
    memory: &GuestMemoryMmap,
    ram: &[Range<u64>],
    mut header: setup_header,
    initrd: Range<u64>,
    image: &Image<'_>,
) -> Result<(), BootError> {
    header.type_of_loader = LOADER_TYPE_UNDEFINED;
    header.cmd_line_ptr = layout::COMMAND_LINE as u32;
    header.cmdline_size = image.command_line.len() as u32;
    header.ramdisk_image = initrd.start as u32;
    header.ramdisk_size = (initrd.end - initrd.start) as u32;
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: layout::RSDP_BASE, ..Default::default() };
    let map = e820(ram, image.more_memory);
    for (entry, (range, kind)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: range.start, size: range.end - range.start, r#type: *kind };
    }
    params.e820_entries = map.len() as u8;
    memory.write_obj(params, GuestAddress(layout::BOOT_PARAMS)).map_err(BootError::Memory)
}

fn write_start_info(
    memory: &GuestMemoryMmap,
    ram: &[Range<u64>],
    initrd: Range<u64>,
    image: &Image<'_>,
) -> Result<(), BootError> {
    let map: Vec<_> = e820(ram, image.more_memory)
        .into_iter()
        .map(|(range, kind)| hvm_memmap_table_entry {
            addr: range.start,
            size: range.end - range.start,
            type_: kind,
            reserved: 0,
        })
        .collect();
    let modules = if initrd.is_empty() { 0 } else { 1 };
    let info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: 1,
        nr_modules: modules,
        modlist_paddr: MODULE_LIST,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: layout::RSDP_BASE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let module =
        hvm_modlist_entry { paddr: initrd.start, size: initrd.end - initrd.start, ..Default::default() };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    params.set_modules(&[module], GuestAddress(MODULE_LIST));
    PvhBootConfigurator::write_bootparams(&params, memory)
        .map_err(|_| BootError::NoRoom { needed: MEMORY_MAP, available: 0 })
}

/// Writes what firmware leaves behind: a GDT, page tables that map the first 4 GiB onto themselves, and the
/// code at the reset vector.
pub fn write_start_state(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    let write = |value: u64, at: u64| memory.write_obj(value, GuestAddress(at)).map_err(BootError::Memory);
    memory.write_slice(&RESET_VECTOR_CODE, GuestAddress(RESET_VECTOR)).map_err(BootError::Memory)?;
    for (index, descriptor) in gdt().into_iter().enumerate() {
        write(descriptor, layout::BOOT_GDT + 8 * index as u64)?;
    }
    let (pml4, pdpt, pd) = page_tables();
    write(pdpt | 3, pml4)?;
    for gib in 0..4 {
        write((pd + 0x1000 * gib) | 3, pdpt + 8 * gib)?;
        for entry in 0..512 {
            write((gib << 30) | (entry << 21) | 0x83, pd + 0x1000 * gib + 8 * entry)?;
        }
    }
    Ok(())
}

/// Addresses of the top table, the second-level table and the first of four third-level tables.
fn page_tables() -> (u64, u64, u64) {
    let base = layout::BOOT_PAGE_TABLES;
    (base, base + 0x1000, base + 0x2000)
}

/// Null, null, code, data: the selectors 0x10 and 0x18 that the boot protocol names.
fn gdt() -> [u64; 4] {
    [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]
}

/// What firmware sets in every processor: memory is write-back unless page tables say otherwise, and fast string
/// operations are on. Linux clears ERMS without them, and loses its recoverable copy (`early_init_intel`).
pub const FIRMWARE_MSRS: [(u32, u64); 2] =
    [(MSR_MTRR_DEF_TYPE, MTRR_ENABLED | MTRR_WRITE_BACK), (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS)];
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;
const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;

/// Registers of the first vCPU at `entry`.
pub fn start_registers(entry: Entry, sregs: &mut kvm_sregs) -> kvm_regs {
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    let data = kvm_segment { selector: 0x18, type_: 3, db: 1, ..flat };
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data;
    }
    sregs.gdt.base = layout::BOOT_GDT;
    sregs.gdt.limit = size_of_val(&gdt()) as u16 - 1;
    let regs = kvm_regs { rflags: 2, ..Default::default() };
    match entry {
        Entry::Long { rip } => {
            sregs.cs = kvm_segment { selector: 0x10, type_: 11, l: 1, ..flat };
            sregs.cr3 = page_tables().0;
            sregs.cr4 |= CR4_PAE;
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.efer = EFER_LME | EFER_LMA;
            kvm_regs { rip, rsi: layout::BOOT_PARAMS, ..regs }
        }
        Entry::Pvh { rip } => {
            sregs.cs = kvm_segment { selector: 0x10, type_: 11, db: 1, ..flat };
            sregs.cr0 = CR0_PE | CR0_ET;
            kvm_regs { rip, rbx: START_INFO, ..regs }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryBackend;

    const RAM: Range<u64> = 0..64 << 20;
    const SMALL: Range<u64> = 0..32 << 20;

    #[test]
    fn the_memory_map_is_ordered_and_leaves_firmware_out_of_ram() {
        let more = [(0x2_0000_0000..0x2_4000_0000, E820_SOFT_RESERVED)];
        let map = e820(&[0..0xc000_0000, 0x1_0000_0000..0x1_4000_0000], &more);
        assert!(map.windows(2).all(|w| w[0].0.end <= w[1].0.start), "{map:x?}");
        let kind = |gpa: u64| map.iter().find(|(r, _)| r.contains(&gpa)).map(|(_, k)| *k);
        assert_eq!(kind(0x1000), Some(E820_RAM));
        assert_eq!(kind(0xb_8000), None);
        assert_eq!(kind(layout::RSDP_BASE), Some(E820_RESERVED));
        assert_eq!(kind(layout::TABLES_BASE), Some(E820_ACPI));
        assert_eq!(kind(layout::MAILBOX_BASE), Some(E820_NVS));
        for apei in [layout::APEI_BASE, layout::BERT_BASE, layout::EINJ_BASE - 1] {
            assert_eq!(kind(apei), Some(E820_NVS));
        }
        for apei in [layout::EINJ_BASE, layout::ERST_BASE, layout::ACPI_END - 1] {
            assert_eq!(kind(apei), Some(E820_RESERVED));
        }
        assert_eq!(kind(layout::ACPI_END), Some(E820_RAM));
        assert_eq!(kind(layout::KERNEL_MIN), Some(E820_RAM));
        assert_eq!(kind(0xbfff_ffff), Some(E820_RAM));
        assert_eq!(kind(layout::ECAM_BASE), Some(E820_RESERVED));
        assert_eq!(kind(0x1_3fff_ffff), Some(E820_RAM));
        assert_eq!(kind(0x1_4000_0000), None);
        assert_eq!(kind(0x2_3fff_ffff), Some(E820_SOFT_RESERVED));
    }

    #[test]
    fn what_is_no_kernel_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinuz");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        let image = Image { kernel: &path, initrd: &[], command_line: "", more_memory: &[] };
        assert!(matches!(load(&memory, std::slice::from_ref(&RAM), &image), Err(BootError::Read { .. })));
        for content in [&b"MZ"[..], &[0; 4096], b"\x7fELF\x02\x01\x01"] {
            std::fs::write(&path, content).unwrap();
            let error = load(&memory, std::slice::from_ref(&RAM), &image).unwrap_err();
            assert!(error.to_string().contains("vmlinuz"), "{error}");
        }
    }

    #[test]
    fn an_initrd_that_does_not_fit_is_refused_with_both_sizes() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap();
        let error = place_initrd(&memory, std::slice::from_ref(&SMALL), &[0; 8 << 20], 28 << 20, u64::MAX)
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "Kernel and initial RAM disk need 0x2400000 bytes below 3 GiB and the machine has 0x2000000; give it more --memory"
        );
        let placed =
            place_initrd(&memory, std::slice::from_ref(&SMALL), &[7; 5000], 28 << 20, 0x01ff_ffff).unwrap();
        assert_eq!(placed, 0x1ffe000..0x1ffe000 + 5000);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x1ffe000)).unwrap(), 7);
        assert_eq!(memory.num_regions(), 1);
    }
}
