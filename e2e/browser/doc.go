// Package browser opens the web pages of promferry in a real Chromium: see its tests.
package browser
