//! The app info extension (kms-protocol §7.6): MessagePack, an array by position or, later, a named map.

use crate::attestation_encoding::{
    Error, MsgpackOnce as Once, MsgpackReader as Reader, MsgpackWriter as Writer,
};

/// Who an app certificate was issued to, decoded from a request's attestation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AppInfo {
    /// App id.
    pub app_id: Vec<u8>,
    /// Compose hash.
    pub compose_hash: Vec<u8>,
    /// Instance id.
    pub instance_id: Vec<u8>,
    /// Device id.
    pub device_id: Vec<u8>,
    /// System measurement.
    pub mr_system: Vec<u8>,
    /// Aggregated measurement.
    pub mr_aggregated: Vec<u8>,
    /// Image hash.
    pub os_image_hash: Vec<u8>,
    /// Key provider's description.
    pub key_provider_info: Vec<u8>,
    /// Hashes of init scripts; absent before generation C.
    pub init_script_hashes: Option<Vec<Vec<u8>>>,
}

/// The byte fields in their order by position.
const FIELDS: [&str; 8] = [
    "app_id",
    "compose_hash",
    "instance_id",
    "device_id",
    "mr_system",
    "mr_aggregated",
    "os_image_hash",
    "key_provider_info",
];
const SCRIPTS: &str = "init_script_hashes";

impl AppInfo {
    /// Decodes either form: an array of 8 (generations A and B) or 9 items, or a named map.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let mut reader = Reader::new(bytes);
        let mut fields = FIELDS.map(Once::new);
        let mut scripts = Once::new(SCRIPTS);
        if reader.at_array() {
            let count = reader.array_len("app info")?;
            if count != FIELDS.len() && count != FIELDS.len() + 1 {
                return Err(Error::Invalid { what: "app info" });
            }
            for (slot, name) in fields.iter_mut().zip(FIELDS) {
                slot.set(reader.bytes(name)?)?;
            }
            if count > FIELDS.len() {
                scripts.set(read_scripts(&mut reader)?)?;
            }
        } else {
            reader.map("app info", |reader, key| {
                if key == SCRIPTS {
                    return scripts.set(read_scripts(reader)?);
                }
                match FIELDS.iter().position(|name| *name == key) {
                    Some(index) => fields[index].set(reader.bytes(FIELDS[index])?),
                    None => Ok(false),
                }
            })?;
        }
        reader.end()?;
        let [
            app_id,
            compose_hash,
            instance_id,
            device_id,
            mr_system,
            mr_aggregated,
            os_image_hash,
            key_provider,
        ] = fields;
        Ok(Self {
            app_id: app_id.required()?,
            compose_hash: compose_hash.required()?,
            instance_id: instance_id.required()?,
            device_id: device_id.required()?,
            mr_system: mr_system.required()?,
            mr_aggregated: mr_aggregated.required()?,
            os_image_hash: os_image_hash.required()?,
            key_provider_info: key_provider.required()?,
            init_script_hashes: scripts.optional().flatten(),
        })
    }

    /// Encodes by position with 9 items, as generation C does.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::default();
        writer.array(FIELDS.len() + 1);
        for field in [
            &self.app_id,
            &self.compose_hash,
            &self.instance_id,
            &self.device_id,
            &self.mr_system,
            &self.mr_aggregated,
            &self.os_image_hash,
            &self.key_provider_info,
        ] {
            writer.bin(field);
        }
        match &self.init_script_hashes {
            None => writer.nil(),
            Some(hashes) => {
                writer.array(hashes.len());
                hashes.iter().for_each(|hash| writer.bin(hash));
            }
        }
        writer.out
    }
}

fn read_scripts(reader: &mut Reader<'_>) -> Result<Option<Vec<Vec<u8>>>, Error> {
    if reader.nil() {
        return Ok(None);
    }
    reader.list(SCRIPTS, |reader| reader.bytes(SCRIPTS)).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vectors::bytes;

    fn example() -> AppInfo {
        AppInfo {
            app_id: vec![0x11; 20],
            compose_hash: vec![0x22; 32],
            instance_id: vec![],
            device_id: vec![0x44; 32],
            mr_system: vec![0x55; 32],
            mr_aggregated: vec![0x66; 32],
            os_image_hash: vec![0x77; 32],
            key_provider_info: vec![],
            init_script_hashes: Some(vec![]),
        }
    }

    fn vector() -> Vec<u8> {
        let filled = |byte: &str, len| format!("{len}{}", byte.repeat(if len == "c414" { 20 } else { 32 }));
        bytes(&format!(
            "99{}{}c400{}{}{}{}c40090",
            filled("11", "c414"),
            filled("22", "c420"),
            filled("44", "c420"),
            filled("55", "c420"),
            filled("66", "c420"),
            filled("77", "c420")
        ))
    }

    /// Frozen (§13.5): fix the code, not the vector.
    #[test]
    fn app_info_is_frozen() {
        assert_eq!(example().encode(), vector());
        assert_eq!(AppInfo::decode(&vector()).unwrap(), example());
        let mut without_scripts = vector();
        *without_scripts.last_mut().unwrap() = 0xC0;
        let info = AppInfo { init_script_hashes: None, ..example() };
        assert_eq!(info.encode(), without_scripts);
        assert_eq!(AppInfo::decode(&without_scripts).unwrap(), info);
    }

    #[test]
    fn eight_items_and_named_maps_are_read_too() {
        let mut eight = vector();
        eight[0] = 0x98;
        eight.pop();
        assert_eq!(AppInfo::decode(&eight).unwrap(), AppInfo { init_script_hashes: None, ..example() });

        let mut named = Writer::default();
        named.map(9);
        named.str("unknown");
        named.nil();
        let info = example();
        let values = [
            &info.app_id,
            &info.compose_hash,
            &info.instance_id,
            &info.device_id,
            &info.mr_system,
            &info.mr_aggregated,
            &info.os_image_hash,
            &info.key_provider_info,
        ];
        for (name, value) in FIELDS.iter().zip(values).rev() {
            named.str(name);
            named.bin(value);
        }
        assert_eq!(AppInfo::decode(&named.out).unwrap(), AppInfo { init_script_hashes: None, ..example() });
    }

    #[test]
    fn every_truncation_is_rejected() {
        let whole = vector();
        for len in 0..whole.len() {
            let error = AppInfo::decode(&whole[..len]).unwrap_err();
            assert!(matches!(error, Error::Truncated { .. }), "a prefix of {len} bytes: {error}");
        }
        assert_eq!(AppInfo::decode(&[0x97]), Err(Error::Truncated { what: "app info" }));
    }
}
