# SPDX-License-Identifier: Apache-2.0
"""Texts and chats: files -> documents -> tokens -> windows."""
