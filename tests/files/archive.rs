//! The container of `torch.save`, written.

/// An archive whose members are stored as they are.
pub fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut bytes, mut directory) = (Vec::new(), Vec::new());
    let u16s = |to: &mut Vec<u8>, values: &[u16]| {
        values
            .iter()
            .for_each(|value| to.extend(value.to_le_bytes()));
    };
    let u32s = |to: &mut Vec<u8>, values: &[u32]| {
        values
            .iter()
            .for_each(|value| to.extend(value.to_le_bytes()));
    };
    for (name, content) in members {
        let (start, size) = (bytes.len() as u32, content.len() as u32);
        bytes.extend(b"PK\x03\x04");
        u16s(&mut bytes, &[20, 0, 0, 0, 0]);
        u32s(&mut bytes, &[0, size, size]);
        u16s(&mut bytes, &[name.len() as u16, 0]);
        bytes.extend(name.as_bytes());
        bytes.extend(*content);
        directory.extend(b"PK\x01\x02");
        u16s(&mut directory, &[20, 20, 0, 0, 0, 0]);
        u32s(&mut directory, &[0, size, size]);
        u16s(&mut directory, &[name.len() as u16, 0, 0, 0, 0]);
        u32s(&mut directory, &[0, start]);
        directory.extend(name.as_bytes());
    }
    let start = bytes.len() as u32;
    let size = directory.len() as u32;
    bytes.extend(directory);
    bytes.extend(b"PK\x05\x06");
    u16s(
        &mut bytes,
        &[0, 0, members.len() as u16, members.len() as u16],
    );
    u32s(&mut bytes, &[size, start]);
    u16s(&mut bytes, &[0]);
    bytes
}
