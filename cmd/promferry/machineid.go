package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
)

// machineIDFile has the host's identity, see machine-id(5).
var machineIDFile = "/etc/machine-id"

// machineID returns the host's identity: 32 hexadecimal digits. It is confidential, and must
// leave the host as a hash only.
func machineID() (string, error) {
	b, err := os.ReadFile(machineIDFile)
	if err != nil {
		return "", err
	}
	id := strings.TrimSpace(string(b))
	if raw, err := hex.DecodeString(id); err != nil || len(raw) != 16 || strings.ToLower(id) != id {
		return "", fmt.Errorf("%s: no machine ID: want 32 hexadecimal digits", machineIDFile)
	}
	return id, nil
}

// hostIDApplication tells our host IDs from those that other programs make of the same
// machine ID. It was drawn at random.
const hostIDApplication = "d4344a1b0676f3220aba72c28d9fc3c9"

// hostID returns what proxies know the host by, "" where there is no machine ID, as in many
// containers. It is what sd_id128_get_machine_app_specific(3) returns, and
// "systemd-id128 machine-id --app-specific" prints.
func hostID() string {
	id, err := machineID()
	if err != nil {
		return ""
	}
	key, _ := hex.DecodeString(id) // It was checked.
	application, _ := hex.DecodeString(hostIDApplication)
	mac := hmac.New(sha256.New, key)
	_, _ = mac.Write(application)
	sum := mac.Sum(nil)[:16]
	sum[6] = sum[6]&0x0f | 0x40 // Version 4
	sum[8] = sum[8]&0x3f | 0x80 // and variant 1 of a UUID, RFC 9562.
	return hex.EncodeToString(sum)
}
