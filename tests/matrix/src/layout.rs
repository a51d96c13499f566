//! Where things are in a bare guest.
//!
//! Memory is two regions: one for everything that the guest needs to run, and one for operands. Code, operands and
//! devices have page tables of their own below the top level, so that a guard on one of them is not one on the rest.

/// The region of tables, handlers, code and stacks; supervisor code sees it at its own address.
pub const LOW: u64 = 0;
/// Its length.
pub const LOW_LEN: u64 = 0x4_0000;
/// The region of operands.
pub const DATA: u64 = 0x43_0000;
/// Its length.
pub const DATA_LEN: u64 = 0x8000;

/// Top page table, and the one above it with five levels.
pub const PML4: u64 = 0x1000;
pub const PML5: u64 = 0x5000;
/// Tables below the top one for [`LOW`] at its own address: directory pointers, directory, pages.
pub const LOW_TABLES: [u64; 3] = [0x2000, 0x3000, 0x4000];
/// The same for code and stack.
pub const CODE_TABLES: [u64; 3] = [0x1_0000, 0x1_1000, 0x1_2000];
/// The same for operands.
pub const DATA_TABLES: [u64; 3] = [0x1_4000, 0x1_5000, 0x1_6000];
/// The same for the device.
pub const DEVICE_TABLES: [u64; 3] = [0x1_8000, 0x1_9000, 0x1_a000];

pub const GDT: u64 = 0x6000;
pub const GDT_LEN: u16 = 0x80;
pub const IDT: u64 = 0x7000;
/// The stack pointer for level 0 lies in another line than the stack table.
pub const TSS: u64 = 0x8030;
pub const TSS_LEN: u16 = 0x68;
/// Another one, for LTR.
pub const SPARE_TSS: u64 = 0x8830;
/// Page of the stack of machine checks, IST 1.
pub const MC_STACK: u64 = 0x9000;
/// Page of the stack for entries from user mode.
pub const KERNEL_STACK: u64 = 0xa000;
/// Handlers.
pub const STUBS: u64 = 0xb000;
/// What the handler of machine checks has read.
pub const RECORD: u64 = 0xc000;
/// Vector registers at the start: an XSAVE area.
pub const XSAVE: u64 = 0xd000;
/// Page of a stack that rows name in the task state, IST 2.
pub const SPARE_STACK: u64 = 0xe000;

/// Code under test: four pages.
pub const CODE: u64 = 0x2_0000;
/// Its stack: two pages.
pub const STACK: u64 = 0x2_4000;
/// A page that is free for rows: a copy of a table, a handler.
pub const SPARE: u64 = 0x2_8000;
/// Linear address of [`CODE`]: entry 8 of the top table, so another line of it than that of [`LOW`].
pub const CODE_VA: u64 = (8 << 39) | CODE;
/// Linear address of the top of the stack.
pub const STACK_TOP_VA: u64 = (8 << 39) | STACK_TOP;
/// The same at its own address.
pub const STACK_TOP: u64 = STACK + 0x1f00;
/// Linear address of [`DATA`]: entry 16 of the top table and of the one below. The low 30 bits are those of the
/// physical address, so that pages of all sizes can map it.
pub const DATA_VA: u64 = (16 << 39) | (16 << 30) | DATA;
/// A device: nothing of KVM's is there.
pub const DEVICE: u64 = 0xd000_0000;
/// Linear address of [`DEVICE`].
pub const DEVICE_VA: u64 = (24 << 39) | 0xd000_0000;
/// Its length.
pub const DEVICE_LEN: u64 = 0x1000;

/// Selectors. SYSRET wants the user's data segment right before its code segment.
pub const KERNEL_CS: u16 = 0x08;
pub const KERNEL_SS: u16 = 0x10;
pub const USER_SS: u16 = 0x1b;
pub const USER_CS: u16 = 0x23;
pub const TASK: u16 = 0x28;
/// The second line of the table has what only rows load: data, code, a task state.
pub const OTHER_DATA: u16 = 0x40;
pub const OTHER_CODE: u16 = 0x48;
pub const OTHER_TASK: u16 = 0x50;
/// 32-bit code of the user, in the first line of nothing else.
pub const COMPATIBILITY_CS: u16 = 0x63;

/// Ports: a handler was reached (a port for each vector), the program is done, the start values are in place, the
/// machine check is handled, a device's register.
pub const PORT_VECTOR: u8 = 0xc0;
pub const PORT_DONE: u8 = 0xf0;
pub const PORT_READY: u8 = 0xf1;
pub const PORT_HANDLED: u8 = 0xf2;
pub const PORT_DEVICE: u8 = 0xf3;

/// Vectors beyond those of the processor that have a handler, in the order of their ports after the first 32.
pub const EXTRA_VECTORS: [u8; 3] = [0x20, 0x21, 0x80];
